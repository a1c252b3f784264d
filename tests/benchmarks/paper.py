"""The rows of the paper (arXiv 2506.08010), measured again, with the numbers that it reports beside them.

    python -m tests.benchmarks.paper --calibration photos/ --out paper.md \
        --dinov2 facebook/dinov2-large --openclip laion/CLIP-ViT-B-16-laion2B-s34B-b88K \
        --voc07 VOC2007 --voc12 VOC2012 --coco20k COCO20k --ade20k ADE20k --nyud NYUd \
        --imagenet ILSVRC/val --imagenet-masks ISeg

Each data set is a folder as docs/evaluation.md has it. What is not given is a row that says so; the file is written
anew after every row, and a row that it has is not measured again. `--limit 100` tries all of it on a few photos first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import testreg
from testreg.checkpoints import load_base
from testreg.checkpoints.atomic import replacing_file
from testreg.judging.evaluation import evaluate
from testreg.judging.tasks import Attention, Classify, Depth, Discovery, Probe, Task

PATCHED = "as published"  # the arm with the published recipe's plan
AUTO = "found here"  # and the one with the plan that `find` makes with nothing to set
BARE = "neurons taken, no register"

DINOV2_NEURONS = {
    17: (884, 133, 1427, 3464, 2373, 2436, 841, 3574, 2129, 3355, 4047, 3341, 1330, 4031, 844, 944, 464),
    16: (2301, 3576, 1940, 3463, 1244, 407, 3152, 2517, 3465),
    15: (1714, 3507, 2492, 2680, 131, 720, 3499, 3062, 2625),
    14: (2110, 1510, 1082, 2711, 2464, 147, 543, 581),
    13: (2400,),
    12: (3168,),
}


@dataclass(frozen=True)
class Row:
    """One row of the paper.

    Attributes:
        model, data: names of the options that give them.
        metric: how the name of the measure begins.
        reported: arm -> what the paper says.
        unlike: in what the protocol here is another one, if it is.
        digits: of its numbers, behind the point.
    """

    name: str
    model: str
    data: str
    task: Task
    metric: str
    reported: Mapping[str, float] = field(default_factory=dict)
    unlike: str = ""
    digits: int = 1


def reported(unpatched: float, patched: float, **more: float) -> dict[str, float]:
    return {"unpatched": unpatched, PATCHED: patched, **more}


OWN_SWEEP = "the paper takes the best block, feature and bias; here they are fixed (`--sweep` of evaluate tries them)"
ROWS = (
    Row("DINOv2-L, LOST CorLoc, VOC07", "dinov2", "voc07", Discovery(), "CorLoc", reported(32.2, 53.8), OWN_SWEEP),
    Row("DINOv2-L, LOST CorLoc, VOC12", "dinov2", "voc12", Discovery(), "CorLoc", reported(36.8, 57.9), OWN_SWEEP),
    Row("DINOv2-L, LOST CorLoc, COCO20k", "dinov2", "coco20k", Discovery(), "CorLoc", reported(25.4, 41.9), OWN_SWEEP),
    Row(
        "DINOv2-L, linear segmentation, ADE20k, mIoU", "dinov2", "ade20k", Probe(side=518), "mIoU",
        reported(48.3, 49.1), "a probe of 200 steps on half of the photos, judged on the others",
    ),
    Row(
        "DINOv2-L, linear depth, NYUd, RMSE in m", "dinov2", "nyud", Depth(side=518), "RMSE", reported(0.388, 0.377),
        "photos made square; 256 even bins and squared error, 200 steps on half of the photos, judged on the others", 3,
    ),
    Row(
        "DINOv2-L, ImageNet, top-1", "dinov2", "imagenet", Classify(), "kNN top-1", reported(86.4, 86.4),
        "nearest neighbours among the photos given, not the published linear head",
    ),
    Row(
        "OpenCLIP B/16, ImageNet zero-shot, top-1", "openclip", "imagenet", Classify(), "zero-shot top-1",
        reported(71.3, 71.3, **{BARE: 55.6}), "one prompt, where the published protocol averages 80",
    ),
    Row(
        "OpenCLIP B/16, zero-shot segmentation, mIoU", "openclip", "imagenet_masks", Attention(), "mIoU",
        reported(34.7, 40.0),
    ),
)  # fmt: skip


def plan_of(name: str, model: Any, photos: str, sure: bool) -> testreg.RegisterPlan:
    """The published plan: DINOv2-L's neurons as printed, OpenCLIP's by the published recipe."""
    if name == "dinov2" and not sure:
        return testreg.RegisterPlan(DINOV2_NEURONS, registers=1)
    blocks = (0, min(5, len(testreg.runtime.find_tower(model).blocks) - 1))
    return testreg.find(model, photos, recipe="paper", blocks=blocks, top_k=10, force=True)


def measure(row: Row, model: Any, plans: Mapping[str, Any], data: str, limit: int | None) -> dict[str, Any]:
    """Arm -> value and interval."""
    found = {}
    for arm, plan in plans.items():
        table = evaluate(model, data, row.task, plan=plan, baselines=arm == PATCHED, limit=limit, progress=True)
        for one in table:
            if one.metric.startswith(row.metric) and one.kind == "fixed":
                name = arm if one.arm == "patched" else one.arm
                found[name] = [one.value, one.low, one.high]
    return found


def table(done: Mapping[str, Any]) -> str:
    """All rows as Markdown: reported and measured side by side."""
    lines = ["| row | arm | reported | measured here | 95 % | protocol |", "| --- | --- | --- | --- | --- | --- |"]
    for row in ROWS:
        found = done.get(row.name)
        if not isinstance(found, dict):
            said = found or "not run"
            lines += [
                f"| {row.name} | {arm} | {value} | {said} | | {row.unlike} |" for arm, value in row.reported.items()
            ]
            continue
        for arm, (value, low, high) in found.items():
            measured, *interval = (f"{number:.{row.digits}f}" for number in (value, low, high))
            cells = (row.name, arm, row.reported.get(arm, ""), measured, " to ".join(interval), row.unlike)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", help="16 to 64 photos, without labels, that plans are found on")
    parser.add_argument("--out", type=Path, default=Path("paper.md"))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--find-all", action="store_true", help="find DINOv2's plan too: for other models in its place")
    for name in dict.fromkeys([row.model for row in ROWS] + [row.data for row in ROWS]):
        parser.add_argument(f"--{name.replace('_', '-')}")
    given = vars(parser.parse_args(arguments))
    kept = given["out"].with_suffix(".json")
    done: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for model in dict.fromkeys(row.model for row in ROWS):
        rows = [row for row in ROWS if row.model == model and not isinstance(done.get(row.name), dict)]
        missing = [name for name in (model, "calibration") if not given[name]]
        loaded: Any = None if missing or not rows else load_base(given[model])
        plans: dict[str, Any] = {}
        for row in rows:
            lacks = [*missing, *([] if given[row.data] else [row.data])]
            if lacks:
                done[row.name] = f"not run: no --{lacks[0].replace('_', '-')}"
            else:
                try:
                    if not plans:
                        plans[PATCHED] = plan_of(model, loaded, given["calibration"], given["find_all"])
                        plans[AUTO] = testreg.find(loaded, given["calibration"], force=True)
                    done[row.name] = measure(row, loaded, plans, given[row.data], given["limit"])
                except Exception as error:  # the other rows go on
                    done[row.name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
            for file, text in ((kept, json.dumps(done, indent=2)), (given["out"], table(done))):
                with replacing_file(file) as build:
                    build.write_text(text)
            print(f"{row.name}: {done[row.name]}", flush=True)
    print(f"\n{table(done)}\nin {given['out']}")


if __name__ == "__main__":
    main()
