"""What registers are worth when a model is quantised.

`python -m tests.benchmarks.quantisation [simulated|onnx|quantisers|all]`

Real weights. Calibrated on 64 photos, on which the registers are found too; scored on the 150 others. Agreement is the
share of photos whose largest output is that of the float model as it came.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForImageClassification

import testreg
from testreg import RegisterPlan
from testreg.cli import words
from testreg.export.int8 import export_int8
from testreg.export.quantiser import Int8
from testreg.export.rest import put_at_rest
from testreg.finding.as_tokens import as_tokens
from testreg.images.streaming import stream
from testreg.judging.asking import ask
from testreg.judging.quantise import FP8, Scheme, quantised
from testreg.metrics import agreement
from tests.benchmarks.method import ASSETS, photos
from tests.quantisers import QUANTISERS

WEAK = 10  # the block after which the depth encoder's weak artefact is
SCHEMES = (
    None,
    Scheme(8, 8),
    Scheme(8, 8, per_channel=True, even=True),
    Scheme(6, 6, per_channel=True, even=True),
    Scheme(8, 8, per_channel=True, per_token=True),
    Scheme(8, 8, clip=0.9999),
    Scheme(6, 6),
    Scheme(6, 6, per_channel=True, per_token=True),
    Scheme(4, 8, per_channel=True, even=True),
    Scheme(4, 4, per_channel=True, per_token=True),
    Scheme(4, 16, per_channel=True),
    *([Scheme("fp8", "fp8")] if FP8 is not None else []),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["simulated", "onnx", "quantisers", "all"], default="all")
    parser.add_argument("--plan", help="registers of vit-tiny-augreg, instead of those that are found")
    parser.add_argument("--only", action="append", help="a row of the simulated table, as it is called; again")
    given = parser.parse_args()
    if given.what in ("simulated", "all"):
        simulated(given.plan, given.only)
    if given.what in ("onnx", "all"):
        onnx(given.plan)
    if given.what in ("quantisers", "all"):
        quantisers(given.plan)


def simulated(plan: str | None, only: list[str] | None) -> None:
    """`vit-tiny-augreg`, every linear with few bits, in every form."""
    model = AutoModelForImageClassification.from_pretrained(ASSETS / "checkpoints" / "vit-tiny-augreg").eval()
    calibration, scoring = photos()
    seen, judged = ([dict(batch.inputs) for batch in stream(part, model=model)] for part in (calibration, scoring))
    found = RegisterPlan.load(plan) if plan else testreg.find(model, calibration)
    arms: dict[str, RegisterPlan | None] = {
        "unpatched": None,
        "paper's recipe": testreg.find(model, calibration, recipe="paper", force=True),
        "token form": as_tokens(model, found, seen),
        "attention registers": found,
    }
    float_ = _answers(model, judged)
    print("| bits | " + " | ".join(arms) + " |")
    print("|---|" + "---|" * len(arms), flush=True)
    for scheme in SCHEMES:
        if only and str(scheme or "float") not in only:
            continue
        cells = []
        for arm in arms.values():
            patch = testreg.patch(model, arm) if arm else None
            if scheme is None:
                answers = _answers(model, judged)
            else:
                with quantised(model, scheme, seen):
                    answers = _answers(model, judged)
            if patch:
                patch.remove()
            score = agreement(answers, float_)
            cells.append(f"{score.same.float().mean():.1%}, {score.cosine.mean():.4f}")
        print(f"| {scheme or 'float'} | " + " | ".join(cells) + " |", flush=True)


def _answers(model: Any, batches: list[Any]) -> torch.Tensor:
    return torch.cat([ask(model, batch)[1] for batch in batches])


def onnx(plan: str | None) -> None:
    """ONNX Runtime's own int8, as `testreg export --int8` writes it."""
    calibration, scoring = photos()
    vit = AutoModelForImageClassification.from_pretrained(ASSETS / "checkpoints" / "vit-tiny-augreg").eval()
    deit = AutoModelForImageClassification.from_pretrained(ASSETS / "checkpoints" / "deit-tiny").eval()
    dino = AutoModel.from_pretrained(ASSETS / "checkpoints" / "dinov2-small-depth").float().eval()
    if plan:
        testreg.patch(vit, plan)
    plain = Int8()
    _table("vit-tiny-augreg, nothing set", vit, calibration, scoring, plain)
    _table("deit-tiny", deit, calibration, scoring, plain)
    few = calibration[:12], scoring[:12]  # 518 pixels each
    _table("dinov2-small-depth", dino, *few, plain)
    norms = testreg.inspect(dino, calibration[:12]).blocks[WEAK].median
    forced = testreg.find(dino, calibration[:12], threshold=1.75 * norms, form="attention", sizes=(), force=True)
    with testreg.patch(dino, forced):
        _table(f"dinov2-small-depth, a plan forced at 1.75 times the median: {forced}", dino, *few, plain)
    for how in (
        replace(plain, operators="all"),
        replace(plain, even=False),
        replace(plain, operators="all", even=True),
        replace(plain, per_tensor=True),
        replace(plain, target="vnni"),
        replace(plain, calibration="percentile"),
        replace(plain, operators="all", keep=("Softmax", "LayerNormalization", "Add")),
    ):
        _table(f"vit-tiny-augreg, {how}", vit, calibration, scoring, how)


def quantisers(plan: str | None) -> None:
    """Other libraries' int8, as tests/runtime/test_quantisers.py calls them."""
    model = AutoModelForImageClassification.from_pretrained(ASSETS / "checkpoints" / "vit-tiny-augreg").eval()
    calibration, scoring = photos()
    seen, judged = ([dict(batch.inputs) for batch in stream(part, model=model)] for part in (calibration, scoring))
    found = RegisterPlan.load(plan) if plan else testreg.find(model, calibration)
    ranges = torch.cat([batch["pixel_values"] for batch in seen])
    float_ = _answers(model, judged)
    print("| quantiser | unpatched | patched | at rest in the weights, patched |\n|---|---|---|---|", flush=True)
    for name in ("torchao static", "quanto static", "torchao dynamic"):
        cells = []
        for arm in ("unpatched", "patched", "at rest"):
            other = copy.deepcopy(model)
            if arm != "unpatched":
                testreg.patch(
                    other, put_at_rest(other, found, {"pixel_values": ranges[:2]}) if arm == "at rest" else found
                )
            score = agreement(_answers(QUANTISERS[name][1](other, ranges), judged), float_)
            cells.append(f"{score.same.float().mean():.1%}, {score.cosine.mean():.4f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def _table(title: str, model: Any, calibration: Any, scoring: Any, how: Int8) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = export_int8(model, calibration, Path(folder) / "model.onnx", held_out=scoring, how=how, force=True)
    print(f"\n{title}\n{words.int8({'out': 'model.onnx', **found.to_dict()})}", flush=True)


if __name__ == "__main__":
    main()
