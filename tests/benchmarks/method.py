"""What each choice of the method is worth, and what finding a plan costs: the tables of docs/method.md.

python -m tests.benchmarks.method quality    # patched against unpatched on the real checkpoint: every form, every knob
python -m tests.benchmarks.method cost       # time and memory of the scan and of `find`, over plain forward passes
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import AutoModelForImageClassification, ViTConfig, ViTModel

import testreg
from testreg import RegisterPlan
from testreg.demo.planted import plant
from testreg.finding.choose import Search, Wanted
from testreg.finding.detect import valley
from testreg.finding.observe import run
from testreg.finding.scan import scan
from testreg.finding.search import located, split
from testreg.finding.still import quiet
from testreg.finding.trial import Bench
from testreg.images.streaming import stream
from testreg.runtime.towers import find_tower

ASSETS = Path(os.environ.get("TESTREG_ASSETS") or Path(__file__).parents[3] / "shared")
PHOTOS = ASSETS / "images" / "coco_cc"
BEST_BY_HAND = {6: (59, 189), 7: (417,)}


def photos() -> tuple[list[Path], list[Path]]:
    """64 for calibration, and all others."""
    calibration = json.loads((PHOTOS / "splits.json").read_text())["calib"][:64]
    files = sorted((PHOTOS / "images").iterdir())
    return [PHOTOS / "images" / name for name in calibration], [file for file in files if file.name not in calibration]


def views(files: list[Path], crops: int) -> Iterator[Image.Image]:
    """Crops of the photos, each as it is and mirrored: more images that the calibration has not seen."""
    random = torch.Generator().manual_seed(0)
    for file in files:
        photo = Image.open(file).convert("RGB")
        for _ in range(crops):
            share, across, down = torch.rand(3, generator=random).tolist()
            side = int(min(photo.size) * (0.5 + 0.5 * share))
            left, top = int(across * (photo.width - side)), int(down * (photo.height - side))
            crop = photo.crop((left, top, left + side, top + side))
            yield crop
            yield ImageOps.mirror(crop)


def plans(search: Search, automatic: RegisterPlan, paper: RegisterPlan) -> Iterator[tuple[str, RegisterPlan]]:
    """What is compared; neurons are added in the order of their score."""
    entry, registers, neurons = automatic.entry, automatic.registers, len(automatic.pairs)
    yield "one inert zero token, no neuron", RegisterPlan({}, 1)
    yield "published recipe: 10 neurons, 1 register", paper
    yield "  its best 3 by hand, 1 register", RegisterPlan(BEST_BY_HAND, 1)
    yield "  its best 3 by hand, 3 registers", RegisterPlan(BEST_BY_HAND, 3)
    yield "**automatic**", automatic
    for count in (1, 2, 4, 6):
        if count != neurons:
            yield f"{count} neurons", search.plan(count, registers, entry)
    for count in (1, 2, 3, 4, 5, 6):
        if count != registers:
            yield f"{count} registers", search.plan(neurons, count, entry)
    for count in (6, 7, 8):
        if count != entry:
            yield f"from block {count} on", search.plan(neurons, registers, count)
    yield "neurons at 0, not at their ordinary mean", search.plan(neurons, registers, entry, zero=True)
    yield "  the same with 6 neurons", search.plan(6, registers, entry, zero=True)
    yield "from block 8 on, neurons at 0", search.plan(neurons, registers, 8, zero=True)
    yield "a state for each of 2 kinds", search.plan(neurons, registers, entry, states=2)
    yield "constant tokens", search.plan(neurons, registers, entry, "constant")
    yield "  the same joining before block 8", search.plan(neurons, registers, 8, "constant")
    yield "dynamic tokens, from the embeddings", search.plan(neurons, registers, 0, "dynamic")
    yield f"dynamic tokens, before block {entry}", search.plan(neurons, registers, entry, "dynamic")
    yield "neurons at 0, no register", replace(automatic, state=None, registers=0, entry=0, rest=None)
    yield "neurons at their mean, no register", replace(automatic, state=None, registers=0, entry=0)


def quality(crops: int) -> None:
    """Print the table of plans."""
    model = AutoModelForImageClassification.from_pretrained(ASSETS / "checkpoints" / "vit-tiny-augreg").eval()
    tower = find_tower(model)
    calibration, scoring = photos()
    with quiet(model):
        norms, sample = scan(model, tower, stream(calibration, model=model))
        found = located(norms, valley(norms))
        ranked, tried, _ = split(sample, found)
        search = Search(model, tower, found, Wanted(), ranked=ranked, tried=tried)
        automatic = search.best()
        paper = Search(model, tower, found, Wanted(recipe="paper"), ranked=ranked, tried=tried).best()
        benches = []
        for images in (scoring, list(views(scoring, crops))):
            _, kept = scan(model, tower, stream(images, model=model), size=len(images))
            benches.append(Bench(model, tower, list(kept), found.threshold, found.block, 16))
        few, many = (sum(map(len, bench.batches)) for bench in benches)
        print(f"automatic: {automatic}; {', '.join(map(str, automatic.pairs))}")
        print(f"outliers are patches above {found.threshold}; {few} photos, {many} crops of them\n")
        print("| plan | neurons | outliers left | agreement | agreement, crops | logits | patches |")
        print("|---|---|---|---|---|---|---|")
        print(f"| unpatched | - | {benches[0].before:.2%} | 100 % | 100 % | 1 | 1 |")
        for name, plan in plans(search, automatic, paper):
            on_photos, on_crops = (bench.score(plan) for bench in benches)
            print(
                f"| {name} | {len(plan.pairs)} | {on_photos.left:.2%} | {on_photos.agreement:.1%} | "
                f"{on_crops.agreement:.1%} | {on_crops.cosine:.4f} | {on_crops.features:.4f} |",
                flush=True,
            )


def tiny() -> tuple[torch.nn.Module, torch.Tensor, int]:
    """ViT-Ti at 224 px, 64 photos, batches of 16."""
    model = AutoModelForImageClassification.from_pretrained(ASSETS / "checkpoints" / "vit-tiny-augreg").eval()
    return model, torch.cat([batch.inputs["pixel_values"] for batch in stream(photos()[0], model=model)]), 16


def base() -> tuple[torch.nn.Module, torch.Tensor, int]:
    """ViT-B/14 at 518 px with planted outliers, 6 images of noise, batches of 2."""
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(image_size=518, patch_size=14)).eval()
    plant(model, where="corners", neurons=2)
    return model, torch.randn(6, 3, 518, 518), 2


def plain(model: torch.nn.Module, images: torch.Tensor, batch_size: int) -> None:
    for batch in stream(images, batch_size=batch_size):
        run(model, batch.inputs, whole=True)


def only_scan(model: torch.nn.Module, images: torch.Tensor, batch_size: int) -> None:
    with quiet(model):
        scan(model, find_tower(model), stream(images, batch_size=batch_size))


def find_at_one_size(model: torch.nn.Module, images: torch.Tensor, batch_size: int) -> None:
    testreg.find(model, images, batch_size=batch_size, sizes=())


def whole_find(model: torch.nn.Module, images: torch.Tensor, batch_size: int) -> None:
    testreg.find(model, images, batch_size=batch_size)


def measure(setting: Callable[..., Any]) -> None:
    """Print the rows of one setting: each arm over the plain passes right before and after it, since a machine's speed
    changes within minutes; peak memory only grows from arm to arm.
    """
    torch.set_num_threads(1)
    model, images, batch_size = setting()
    plain(model, images[:batch_size], batch_size)
    rows = []
    for arm in (plain, only_scan, plain, find_at_one_size, plain, whole_find, plain):
        cpu, wall = time.process_time(), time.perf_counter()
        arm(model, images, batch_size)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
        rows.append((time.process_time() - cpu, time.perf_counter() - wall, memory))
    cpu, wall, first = rows[0]
    print(f"| {setting.__doc__} | plain | {cpu:.1f} s | {wall:.1f} s | {first:.0f} MiB |")
    for name, at in (("scan", 1), ("find, one size", 3), ("find", 5)):
        cpu, wall = (2 * rows[at][kind] / (rows[at - 1][kind] + rows[at + 1][kind]) for kind in (0, 1))
        print(f"| | {name} | {cpu:.2f} | {wall:.2f} | {rows[at][2] / first:.2f} |", flush=True)


def cost(settings: list[str]) -> None:
    """Print the table of times and memory, each setting in a process of its own, since peak memory is a process's."""
    print("| setting | arm | CPU time, over plain | wall time, over plain | peak memory, over plain |")
    print("|---|---|---|---|---|", flush=True)
    for name in settings:
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(SETTINGS[name],))
        process.start()
        process.join()


SETTINGS = {"tiny": tiny, "base": base}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("quality", "cost"))
    parser.add_argument("--crops", type=int, default=5, help="of each photo, each also mirrored")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="of the costs")
    given = parser.parse_args()
    if given.table == "quality":
        quality(given.crops)
    else:
        cost(given.settings)
