"""One plan at several sizes, on photos that it was not found on: `python -m tests.benchmarks.sizes [--plan FILE]`.

`find` with nothing set on 64 photos of `vit-tiny-augreg`, in each form; judged on the 150 others at each size, against
the unpatched model at that size.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from transformers import AutoModelForImageClassification

import testreg
from testreg.finding.detect import valley
from testreg.finding.scan import scan
from testreg.finding.search import located
from testreg.finding.still import quiet
from testreg.finding.trial import Bench
from testreg.images import processor_for, stream
from testreg.images.resized import resized
from testreg.metrics import share
from testreg.runtime.towers import find_tower
from tests.benchmarks.method import ASSETS, photos

OWN = 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", help="a plan to judge, instead of those that are found")
    parser.add_argument("--size", type=int, nargs="+", default=[160, OWN, 320, 448])
    given = parser.parse_args()
    model = AutoModelForImageClassification.from_pretrained(ASSETS / "checkpoints" / "vit-tiny-augreg").eval()
    calibration, scoring = photos()
    if given.plan:
        plans = {given.plan: testreg.RegisterPlan.load(given.plan)}
    else:
        found = testreg.find(model, calibration)
        constant = testreg.find(model, calibration, form="constant")
        plans = {
            "nothing set": found,
            "tokens (form constant)": constant,
            "as many at every size": replace(found, law=None),
            "paper's recipe": testreg.find(model, calibration, recipe="paper", force=True),
        }
    for name, plan in plans.items():
        print(f"{name}: {plan}")
    print("\n| size | plan | registers | outliers | agreement, 95 % interval | cosine | patches |")
    print("|---|---|---|---|---|---|---|", flush=True)
    tower = find_tower(model)
    for side in given.size:
        processor = resized(processor_for(model), side / OWN)
        with quiet(model):
            norms, kept = scan(model, tower, stream(scoring, processor), size=len(scoring))
            artefact = located(norms, valley(norms))
            bench = Bench(model, tower, list(kept), artefact.threshold, artefact.block, 16)
            for name, plan in plans.items():
                score = bench.score(plan)
                same = share(round(score.agreement * score.images), score.images)
                print(
                    f"| {side} | {name} | {plan.registers_for(kept_patches(kept))} | {bench.before:.2%} -> "
                    f"{score.left:.2%} | {same.value:.1%} [{same.low:.1%}, {same.high:.1%}] | {score.cosine:.5f} | "
                    f"{score.features:.5f} |",
                    flush=True,
                )


def kept_patches(kept) -> int:
    """Patches of an image."""
    return next(iter(kept)).norms.shape[-1]


if __name__ == "__main__":
    main()
