"""Two processes against one, on 512 images: `python -m tests.benchmarks.processes`.

Crops of photos lie in a folder; `testreg find` looks at them in one process that has all cores, and under `torchrun` in
two that share them. All that the two plans hold is compared, the statistics in their provenance too: a value that
differs by more than 1e-6, absolute and relative, is printed, and the command fails.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import testreg

from .method import ASSETS, photos, views

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
LIMIT = 1e-6


def crops(folder: Path, count: int) -> None:
    """`count` images made of photos, the same ones each time."""
    files = photos()[0]
    for index, image in zip(range(count), views(files, -(-count // (2 * len(files)))), strict=False):
        image.save(folder / f"{index:04}.jpg", quality=95)


def found(images: Path, threads: int, *launcher: str) -> tuple[testreg.RegisterPlan, float]:
    """The plan of `testreg find`, and the seconds that it takes."""
    model = str(ASSETS / "checkpoints" / "vit-tiny-augreg")
    out = images.with_suffix(".safetensors")
    command = ["-m", "testreg", "find", model, "--images", str(images), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    subprocess.run([sys.executable, *launcher, *command], env=environment, stdout=subprocess.DEVNULL, check=True)
    return testreg.RegisterPlan.load(out), time.perf_counter() - start


def values(plan: testreg.RegisterPlan) -> dict[str, Any]:
    """All that a plan holds."""
    return {**plan.to_dict(), "state": None if plan.state is None else plan.state.tolist()}


def differences(ours: Any, theirs: Any, name: str = "") -> Iterator[tuple[str, float, float]]:
    """Name, absolute and relative difference of every two numbers; infinite where anything else differs."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        for key in ours:
            yield from differences(ours[key], theirs[key], f"{name}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(*pair, f"{name}[{index}]")
    elif isinstance(ours, float) and isinstance(theirs, float):
        apart = abs(ours - theirs)
        yield name, apart, apart / max(abs(ours), abs(theirs), sys.float_info.min)
    else:
        yield (name, 0.0, 0.0) if ours == theirs else (name, math.inf, math.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    count = parser.parse_args().images
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        images = Path(name, "images")
        images.mkdir()
        crops(images, count)
        one, alone = found(images, cores)
        two, together = found(images, max(1, cores // 2), *LAUNCHER)
    every = list(differences(values(one), values(two)))
    print(f"{count} images; two processes take {together / alone:.2f} of the time of one with {cores} threads")
    print(f"neurons: {'the same' if one.neurons == two.neurons else 'NOT THE SAME'}; {one}")
    print(f"{len(every)} values; largest difference {max(row[1] for row in every):.1e}")
    worse = [row for row in every if not min(row[1:]) <= LIMIT]  # as NaN is neither
    for name, absolute, relative in worse:
        print(f"  {name}: {absolute:.1e}, relative {relative:.1e}")
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()
