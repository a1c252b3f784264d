"""What weights alone keep of a patch: the tables of docs/bake.md.

python -m tests.benchmarks.bake start     # what register slots change that nothing has been written to yet
python -m tests.benchmarks.bake whole     # the baked real checkpoint on photos that nothing was fitted to
python -m tests.benchmarks.bake planted   # planted models of every architecture
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageClassification

import testreg
from testreg import RegisterPlan
from testreg.export.bake import algebra, bake, fit
from testreg.export.bake.drift import measure
from testreg.finding.observe import observe, run
from testreg.images.streaming import stream
from testreg.runtime.towers import find_tower

from . import method

BEFORE = 8  # the block whose input is compared
REGISTERS = 4


def checkpoint() -> tuple[Any, RegisterPlan]:
    model = AutoModelForImageClassification.from_pretrained(method.ASSETS / "checkpoints" / "vit-tiny-augreg").eval()
    return model, testreg.find(model, method.photos()[0])


def batches(model: Any) -> tuple[fit.Inputs, fit.Inputs]:
    """Photos to fit to, and 150 others."""
    calibration, others = method.photos()
    fitted, held = ([dict(batch.inputs) for batch in stream(part, model=model)] for part in (calibration[:32], others))
    return fitted, held


def start() -> None:
    """The relative change of all other tokens that slots cause by being there, the register neurons being off."""
    model, plan = checkpoint()
    tower = find_tower(model)
    fitted, held = batches(model)
    states = fit.trajectory(model, plan, fitted)
    last = states[max(states)][:1]
    oven = fit._Oven(model, tower, torch.zeros(REGISTERS), fitted)
    with torch.no_grad():
        pull = oven._pull(range(min(states) + 1))
    begin = algebra.direction(last[0])
    size = last.norm() / tower.channels**0.5
    alone = pull._replace(values=0 * pull.values, value_fixed=0 * pull.value_fixed)  # every value is as far away
    alone = alone._replace(outputs=torch.nn.functional.normalize(pull.outputs, dim=-1))
    states_of = {
        "zeros": 0 * begin,
        "the final state": begin * size,
        "least mean square attention": algebra.repel(alone, REGISTERS, begin) * size,
        "least mean square change of the outputs": algebra.repel(pull, REGISTERS, begin) * size,
    }
    print("| start | change |\n|---|---|")
    off = RegisterPlan(plan.neurons, registers=0, rest=plan.rest)
    for name, state in states_of.items():
        slots = RegisterPlan(plan.neurons, REGISTERS, 0, state[None].expand(REGISTERS, -1), rest=plan.rest)
        changes = []
        for inputs in held:
            without, among = (tokens(model, applied, inputs) for applied in (off, slots))
            changes.append((among - without).norm() / without.norm())
        print(f"| {name} | {torch.stack(changes).mean():.5f} |", flush=True)


def tokens(model: Any, plan: RegisterPlan, inputs: dict[str, Tensor]) -> Tensor:
    with testreg.patch(model, plan), observe(model, states=[BEFORE - 1]) as seen:
        run(model, inputs)
    return seen.states[BEFORE - 1]


def whole() -> None:
    model, plan = checkpoint()
    fitted, held = batches(model)
    states, made = fit.trajectory(model, plan, fitted), copy.deepcopy(model)
    registers = fit.fit(made, plan, states, fitted)
    print(measure(model, plan, made, fit.slots(registers), held, max(states)))


def planted() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torchvision_stub

    torchvision_stub.install()
    import bakeable
    import bakeable_timm

    print("| planted | largest patch norm / median, unpatched | baked | patch cosine with the run-time patch |")
    print("|---|---|---|---|")
    cases = [(name, bakeable.planted, bakeable.photos(64)) for name in bakeable.MODELS]
    cases += [(f"timm {name}", bakeable_timm.planted, bakeable_timm.photos(64)[0]) for name in bakeable_timm.MODELS]
    for name, make, images in cases:
        model, plan = make(name.removeprefix("timm "))
        drift = bake(model, plan, images, force=True).drift
        print(f"| {name} | {drift.outlier_unpatched:.1f} | {drift.outlier:.1f} | {drift.patches:.5f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("start", "whole", "planted"))
    globals()[parser.parse_args().table]()
