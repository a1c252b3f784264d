"""What registers cost in time and memory, and what it costs to find them: `python -m tests.benchmarks.speed`.

Ratios within one run, never absolute times: the arms of a row run in turns, in one process and an order that is drawn
anew for each turn, and a row shows the median over the turns of each arm's time over its partner's in the same turn,
with the 95 % interval of that median (of five turns or fewer, their range). "CPU" is the median of the process's CPU
time, which other work on the machine disturbs less. Arms that do the same with the same weights share them in memory,
and "unpatched again" is a control: how far it is from 1 is how far a machine can be trusted. Times are taken with an
allocator that keeps the memory it has, as jemalloc and tcmalloc do: glibc gives large tensors back and gets them again
page by page, thousands of times in a pass, or not, as their sizes happen to fall ("Page faults"). Memory is the peak
of a process that does one thing. The results go into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import math
import multiprocessing
import os
import platform
import random
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel
from transformers.utils import logging

import testreg
from testreg.demo.planted import plant
from testreg.finding.observe import run
from testreg.finding.scan import patch_norms, scan
from testreg.finding.still import quiet
from testreg.images.streaming import stream
from testreg.runtime import redirect
from testreg.runtime.towers import find_tower

from .method import tiny

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks.md"
SHAPES = {"Ti": (192, 12, 3), "B": (768, 12, 12), "L": (1024, 24, 16)}  # channels, blocks, heads
PATCH = 14
LEAST = {"Ti": 7, "B": 5, "L": 2}  # turns
LONG = ("Larger forward passes, eager", "The largest, eager")  # sections that take more than a few minutes
CUDA = torch.cuda.is_available()
# Of glibc: nothing is given back, for times; everything is at once, for peaks to be those of use.
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
PACKAGES = ("torch", "transformers", "safetensors")
Arm = Callable[[], Any]
Row = tuple[str, ...]


# Models


def vit(shape: str, pixels: int = 224, *, native: int = 0, depth: int | None = None) -> torch.nn.Module:
    """A ViT of DINOv2's architecture with random weights, without or with registers of its own."""
    channels, blocks, heads = SHAPES[shape]
    sizes = {"hidden_size": channels, "num_hidden_layers": depth or blocks, "num_attention_heads": heads}
    sizes |= {"image_size": pixels, "patch_size": PATCH}
    torch.manual_seed(0)
    if native:
        config: Any = Dinov2WithRegistersConfig(**sizes, num_register_tokens=native)
        return Dinov2WithRegistersModel(config).eval()
    return Dinov2Model(Dinov2Config(**sizes)).eval()


def twin(model: torch.nn.Module, shape: str, pixels: int, native: int) -> torch.nn.Module:
    """The same weights, in the same memory, where `native` register tokens are part of the architecture."""
    other = vit(shape, pixels, native=native)
    other.load_state_dict(model.state_dict(), strict=False, assign=True)
    return other


def again(model: torch.nn.Module) -> torch.nn.Module:
    """The same model once more, with its weights in the same memory."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def plans(shape: str, registers: int) -> dict[str, testreg.RegisterPlan]:
    """Three register neurons in two blocks, in every form."""
    channels, blocks, _ = SHAPES[shape]
    middle = blocks // 2
    neurons, entry = {middle - 1: (7,), middle: (3, 4)}, middle + 1
    rows = torch.randn(blocks - entry, registers, channels)
    return {
        "dynamic": testreg.RegisterPlan(neurons, registers),
        "constant": testreg.RegisterPlan(neurons, registers, entry, rows[0, 0]),
        "attention": testreg.RegisterPlan(neurons, registers, entry, rows),
    }


# Measuring


def paired(
    arms: dict[str, Arm], seconds: float, least: int = 7, most: int = 200
) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of every arm in every turn; turns until `seconds` are over, `least` of them at least."""
    for arm in arms.values():
        arm()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    end, turn = time.perf_counter() + seconds, 0
    names, order = list(arms), random.Random(0)
    while turn < least or (time.perf_counter() < end and turn < most):
        order.shuffle(names)  # nobody is always the one after a certain other
        for name in names:
            wall, cpu = time.perf_counter(), time.process_time()
            arms[name]()
            taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        turn += 1
    return taken


def over(taken: dict[str, list[tuple[float, float]]], arm: str, base: str) -> Row:
    """Median of the paired ratios with its 95 % interval, by the wall; and by the CPU."""
    wall, cpu = (
        sorted(ours[kind] / theirs[kind] for ours, theirs in zip(taken[arm], taken[base], strict=True))
        for kind in (0, 1)
    )
    reach = 0.98 * len(wall) ** 0.5  # of the ranks around the middle one, by the binomial distribution
    low, high = max(0, math.floor(len(wall) / 2 - reach)), min(len(wall) - 1, math.ceil(len(wall) / 2 + reach) - 1)
    middle, processor = statistics.median(wall), statistics.median(cpu)
    return f"{middle:.3f} [{wall[low]:.3f}, {wall[high]:.3f}]", f"{processor:.3f}"


def table(head: Row, rows: Iterator[Row] | list[Row]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    return lines


def apart(work: Callable[..., Any], *args: Any, allocator: dict[str, str] = GIVE_BACK) -> tuple[Any, float]:
    """What `work` gives in a process of its own, and that process's peak memory in MiB."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_measured, args=(there, work, args))
    before = dict(os.environ)
    for name in KEEP:
        os.environ.pop(name, None)
    os.environ.update(allocator)
    process.start()
    os.environ.clear()
    os.environ.update(before)
    there.close()
    found = here.recv()
    process.join()
    return found


def _measured(pipe: Any, work: Callable[..., Any], args: Any) -> None:
    found = work(*args)
    # Not getrusage: what it gives starts at the peak of the process that this one was forked from.
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    pipe.send((found, int(peak[1]) / 1024 if peak else math.nan))


# Forward passes


def setting_of(shape: str, pixels: int, batch: int, *more: str) -> str:
    return ", ".join((f"ViT-{shape}", f"{batch} × {pixels} px", *more))


def forwards(shapes: list[tuple[str, int, int, str]], seconds: float, device: str = "cpu", mode: str = "") -> list[str]:
    """Patched against unpatched and against native registers."""
    head = ("forward pass", "registers", "arm", "over unpatched", "CPU", "over native", "CPU")
    print(f"\n{device} {mode or 'eager'}", flush=True)

    def rows() -> Iterator[Row]:
        for shape, pixels, batch, dtype in shapes:
            for registers in (1, 4) if batch == 1 and not mode else (1,):
                about = (setting_of(shape, pixels, batch, dtype), str(registers))
                taken = _forward(shape, pixels, batch, dtype, registers, seconds, device, mode)
                for arm in ("dynamic", "constant", "attention", "native", "unpatched again"):
                    yield (*about, arm, *over(taken, arm, "unpatched"), *over(taken, arm, "native"))

    return table(head, rows())


def _forward(
    shape: str,
    pixels: int,
    batch: int,
    dtype: str,
    registers: int,
    seconds: float,
    device: str,
    mode: str,
    counts: dict[str, list[int]] | None = None,
) -> dict[str, list[tuple[float, float]]]:
    base = vit(shape, pixels).to(device, getattr(torch, dtype))
    native = twin(base, shape, pixels, registers).to(device, getattr(torch, dtype))
    models = {"unpatched": base, "unpatched again": again(base), "native": native}
    for form, plan in plans(shape, registers).items():
        models[form] = again(base)
        testreg.patch(models[form], plan)
    images = torch.randn(batch, 3, pixels, pixels).to(device, getattr(torch, dtype))
    return _timed(models, images, seconds, LEAST[shape], device, mode, counts)


def _timed(
    models: dict[str, torch.nn.Module],
    images: Tensor,
    seconds: float,
    least: int,
    device: str = "cpu",
    mode: str = "",
    counts: dict[str, list[int]] | None = None,
) -> dict[str, list[tuple[float, float]]]:
    """Passes of several models over the same images; page faults of each go into `counts`."""

    def arm(name: str, model: Any) -> Arm:
        called = torch.compile(model, mode=None if mode == "default" else mode) if mode else model

        def forward() -> None:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            with torch.inference_mode():
                called(images)
            if device == "cuda":
                torch.cuda.synchronize()
            if counts is not None:
                counts.setdefault(name, []).append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

        return forward

    torch.compiler.reset()
    return paired({name: arm(name, model) for name, model in models.items()}, seconds, least)


def found(seconds: float) -> list[str]:
    """The real checkpoint under the plan that `find` gives with nothing set, its law included."""
    model, images, _ = tiny()
    plan = testreg.find(model, images)
    models = {"unpatched": model, "as found": again(model), "unpatched again": again(model)}
    testreg.patch(models["as found"], plan)

    def rows() -> Iterator[Row]:
        for batch in (1, 32):
            taken = _timed(models, images[:batch], seconds, LEAST["Ti"])
            for arm in ("as found", "unpatched again"):
                yield f"vit-tiny-augreg, {batch} × 224 px", arm, *over(taken, arm, "unpatched")

    print("\nfound", flush=True)
    return [f"{plan}.", "", *table(("forward pass", "arm", "over unpatched", "CPU"), rows())]


def faults(settings: list[tuple[str, int, int]], seconds: float) -> list[str]:
    """What glibc's allocator adds, as it is without being told otherwise."""

    def rows() -> Iterator[Row]:
        for shape, pixels, batch in settings:
            taken, counts = apart(_faults, shape, pixels, batch, seconds, allocator={})[0]
            for arm in ("unpatched", "unpatched again", "native", "dynamic", "constant", "attention"):
                about = (setting_of(shape, pixels, batch), arm, f"{counts[arm]:.0f}")
                yield (*about, *over(taken, arm, "unpatched"))

    print("\nfaults", flush=True)
    return table(("forward pass", "arm", "page faults in a pass", "over unpatched", "CPU"), rows())


def _faults(shape: str, pixels: int, batch: int, seconds: float) -> Any:
    counts: dict[str, list[int]] = {}
    taken = _forward(shape, pixels, batch, "float32", 1, seconds, "cpu", "", counts)
    return taken, {arm: statistics.median(row) for arm, row in counts.items()}


def pieces(settings: list[tuple[str, int, int]], seconds: float) -> list[str]:
    """Where the time of a patch goes: everything that it does in one forward pass, over that pass without it."""

    def rows() -> Iterator[Row]:
        for setting in settings:
            for name, share in _pieces(*setting, seconds).items():
                yield setting_of(*setting), name, f"{share:.2%}"

    print("\npieces", flush=True)
    return table(("forward pass", "piece", "share of the unpatched pass"), rows())


def _pieces(shape: str, pixels: int, batch: int, seconds: float) -> dict[str, float]:
    """What a patch does in one forward pass, piece by piece, each as a share of the unpatched pass."""
    model = vit(shape, pixels)
    tower = find_tower(model)
    images = torch.randn(batch, 3, pixels, pixels)
    tokens = torch.randn(batch, tower.prefix + (pixels // PATCH) ** 2, tower.channels)
    joined = redirect.join(tokens[:1, :1], tokens)
    moving = (torch.randn(*joined.shape[:2], tower.neurons[0]), torch.tensor([3, 4]), 1, torch.zeros(2))
    done: dict[str, Arm] = {
        "registers join, tokens leave": lambda: (redirect.join(tokens[:1, :1], tokens), joined[:, 1:].contiguous()),
        "the wrappers of blocks and attentions": _wrappers(model, tokens),
        "neurons moved in 2 blocks, dynamic": lambda: [redirect.move(*moving, fill=True) for _ in range(2)],
        "neurons moved in 2 blocks, constant": lambda: [redirect.move(*moving, fill=False) for _ in range(2)],
    }
    whole: dict[str, Arm] = {"pass": lambda: model(images)}
    with torch.inference_mode():
        taken = paired(done | whole, seconds)
    return {
        name: statistics.median(ours[0] / theirs[0] for ours, theirs in zip(taken[name], taken["pass"], strict=True))
        for name in done
    }


def _wrappers(model: torch.nn.Module, tokens: Tensor) -> Arm:
    """All blocks of a patched model one after the other: each calls its attention, and their own work is left out."""
    idle = again(model)
    tower = find_tower(idle)
    for block, attention in zip(tower.blocks, tower.attentions, strict=True):
        attention.forward = lambda hidden_states, *args, **kwargs: hidden_states
        block.forward = lambda hidden_states, attention=attention: attention(hidden_states)
    testreg.patch(idle, testreg.RegisterPlan({}, 1))

    def called() -> None:
        hidden = tokens
        for block in tower.blocks:
            hidden = block(hidden)

    return called


def breaks() -> list[str]:
    """Graph breaks under torch.compile, as dynamo counts them."""

    def rows() -> Iterator[Row]:
        images = torch.randn(2, 3, 224, 224)
        for form, plan in plans("Ti", 4).items():
            with torch.no_grad(), testreg.patch(model := vit("Ti"), plan):
                torch.compiler.reset()
                yield form, str(torch._dynamo.explain(model)(images).graph_break_count)

    print("\ngraph breaks", flush=True)
    return table(("form", "graph breaks"), rows())


def memory(shape: str, pixels: int, batch: int, form: str) -> float:
    """MiB that forward passes take on top of weights and interpreter, in the process that calls this."""
    model, images = vit(shape, pixels, native=int(form == "native")), torch.randn(batch, 3, pixels, pixels)
    if form in ("dynamic", "constant", "attention"):
        testreg.patch(model, plans(shape, 1)[form])
    with torch.inference_mode():
        for _ in range(3):
            model(images)
    return 0.0


def memories(settings: list[tuple[str, int, int]]) -> list[str]:
    """Peak memory of the process, patched over unpatched."""

    def rows() -> Iterator[Row]:
        for setting in settings:
            peaks = {arm: apart(memory, *setting, arm)[1] for arm in ("unpatched", "native", "dynamic", "constant")}
            ratios = (f"{peaks[arm] / peaks['unpatched']:.3f}" for arm in ("native", "dynamic", "constant"))
            yield (setting_of(*setting), *ratios)

    print("\npeak memory", flush=True)
    return table(("forward pass", "native", "dynamic", "constant"), rows())


# Finding


def pictures(count: int, pixels: int) -> Iterator[Tensor]:
    """Processed images, none of them held."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randn(3, pixels, pixels, generator=generator)


def plain(model: torch.nn.Module, images: Any, batch: int) -> None:
    with quiet(model):
        for part in stream(images, batch_size=batch):
            run(model, part.inputs, whole=True)


def scanned(model: torch.nn.Module, images: Any, batch: int) -> None:
    with quiet(model):
        scan(model, find_tower(model), stream(images, batch_size=batch))


def stored(model: torch.nn.Module, images: Any, batch: int) -> None:
    """The straightforward scan: every block's output and every neuron's activation kept, statistics at the end."""
    tower, outputs, activations = find_tower(model), [], []
    hooks = [block.register_forward_hook(lambda m, a, output: outputs.append(output)) for block in tower.blocks]
    hooks += [down.register_forward_pre_hook(lambda m, args: activations.append(args[0])) for down in tower.downs]
    plain(model, images, batch)
    for hook in hooks:
        hook.remove()
    blocks = len(tower.blocks)
    for block in range(blocks):
        norms = torch.cat([patch_norms(tokens, tower) for tokens in outputs[block::blocks]])
        neurons = torch.cat(activations[block::blocks])[:, tower.prefix :]
        neurons[norms >= norms.quantile(0.98)].mean(0)


SCANS: dict[str, Callable[..., None]] = {"plain": plain, "scan": scanned, "storing scan": stored}


def looked(arm: str, shape: str, pixels: int, count: int, batch: int, device: str = "cpu") -> float:
    """Runs it, and gives the peak of a GPU's memory in MiB."""
    SCANS[arm](vit(shape, pixels).to(device), pictures(count, pixels), batch)
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else math.nan


def scans(settings: list[tuple[str, int, int, int]], seconds: float, device: str = "cpu") -> list[str]:
    """The scan against plain passes over the same images."""

    def rows() -> Iterator[Row]:
        for setting in settings:
            shape, pixels, count, batch = setting
            model, images = vit(shape, pixels).to(device), list(pictures(count, pixels))
            arms = {name: partial(scan, model, images, batch) for name, scan in SCANS.items()}
            taken = paired(arms, seconds, 5, 8)
            peaks = {name: apart(looked, name, *setting, device)[device != "cuda"] for name in SCANS}
            for name in ("scan", "storing scan"):
                about = (f"ViT-{shape}", str(pixels), str(count), str(batch), name)
                yield (*about, *over(taken, name, "plain"), f"{peaks[name] / peaks['plain']:.2f}")

    print("\nscan", flush=True)
    head = ("shape", "pixels", "images", "batch", "arm", "over plain passes", "CPU", "peak memory over plain")
    return table(head, rows())


def lasting(counts: tuple[int, ...]) -> list[str]:
    """Peak memory of the scan as images grow in number; a small model, so that the images' part is seen best."""

    def rows() -> Iterator[Row]:
        for arm in ("plain", "scan"):
            peaks = [apart(looked, arm, "Ti", 224, count, 8)[1] for count in counts]
            yield (arm, *(f"{peak / peaks[0]:.3f}" for peak in peaks))

    print("\nmemory against images", flush=True)
    return table(("ViT-Ti, 224 px", *(f"{count} images" for count in counts)), rows())


def finds(counts: tuple[int, ...], seconds: float) -> list[str]:
    """The whole of `find` against plain passes over the same images."""

    def rows() -> Iterator[Row]:
        model = vit("Ti")
        plant(model, neurons=3)
        for count in counts:
            images = list(pictures(count, 224))
            arms: dict[str, Arm] = {
                "plain": lambda images=images: plain(model, images, 16),
                "find": lambda images=images: testreg.find(model, images, force=True),
            }
            yield (str(count), *over(paired(arms, seconds, 1, 5), "find", "plain"))

    print("\nfind", flush=True)
    return table(("images, ViT-Ti 224 px", "find over plain passes", "CPU"), rows())


# Checkpoints and growth


def checkpoints(shapes: list[str], seconds: float) -> list[str]:
    """Sizes and times of saving and loading, patched over original: both hash all weights, and loading checks them."""

    def size(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    def rows() -> Iterator[Row]:
        for shape in shapes:
            with tempfile.TemporaryDirectory() as folder:
                before, after = Path(folder, "before"), Path(folder, "after")
                vit(shape).save_pretrained(before)
                model, unpatched = (Dinov2Model.from_pretrained(before).eval() for _ in range(2))
                testreg.patch(model, plans(shape, 4)["constant"])
                arms: dict[str, Arm] = {
                    "save": lambda model=model, after=after: testreg.save(model, after, replace=True),
                    "plain save": lambda unpatched=unpatched, before=before: unpatched.save_pretrained(before),
                    "load": lambda after=after: testreg.load(after),
                    "plain load": lambda before=before: Dinov2Model.from_pretrained(before),
                }
                taken = paired(arms, seconds, 7, 10)
                card = (after / "README.md").stat().st_size
                share, extra = (size(after) - card) / size(before), (size(after) - card - size(before)) / 1024
                times = (over(taken, "save", "plain save")[0], over(taken, "load", "plain load")[0])
                yield (f"ViT-{shape}", f"{share:.5f}", f"{extra:.0f} KiB", f"{card / 1024:.1f} KiB", *times)

    print("\ncheckpoints", flush=True)
    head = ("shape", "size over original", "which is more by", "model card", "save over plain", "load over plain")
    return table(head, rows())


def growth(seconds: float) -> list[str]:
    """How the cost of a patch grows: seconds of patched over unpatched passes, one thing doubled at a time."""

    def rows() -> Iterator[Row]:
        cases = [("tokens", {"pixels": pixels}, str((pixels // PATCH) ** 2)) for pixels in (112, 224, 448)]
        cases += [("layers", {"depth": depth}, str(depth)) for depth in (6, 12, 24)]
        cases += [("batch", {"batch": batch}, str(batch)) for batch in (1, 4, 16)]
        cases += [("register neurons in each of 6 blocks", {"neurons": count}, str(count)) for count in (1, 8, 64)]
        cases += [("registers", {"registers": count}, str(count)) for count in (1, 4, 16)]
        for name, given, value in cases:
            case: dict[str, int] = {"pixels": 224, "depth": 12, "batch": 4, "neurons": 1, "registers": 1, **given}
            models = [vit("Ti", case["pixels"], depth=case["depth"]) for _ in range(2)]
            row = tuple(range(case["neurons"]))
            neurons = dict.fromkeys(range(6), row) if name.startswith("register neurons") else {3: row}
            testreg.patch(models[1], testreg.RegisterPlan(neurons, case["registers"]))
            images = torch.randn(case["batch"], 3, case["pixels"], case["pixels"])

            def arm(model: Any, images: Tensor = images) -> Arm:
                return torch.inference_mode()(lambda: model(images))

            taken = paired({"unpatched": arm(models[0]), "patched": arm(models[1])}, seconds)
            yield (name, value, *over(taken, "patched", "unpatched"))

    print("\ngrowth", flush=True)
    return table(("ViT-Ti, dynamic form", "value", "patched over unpatched", "CPU"), rows())


# The run


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    gpu = f", {torch.cuda.get_device_name()}" if CUDA else ", no GPU"
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores{gpu}; Python {platform.python_version()}, {versions}."


def cuda(seconds: float) -> list[str]:
    """The same on a GPU."""
    if not CUDA:
        print("\nCUDA: skipped, since this machine has no GPU", flush=True)
        return [
            "Not run: the machine of this run has no GPU. Where one is, `python -m tests.benchmarks.gpu` measures "
            "forward passes, CUDA graphs, int8, ONNX and `find` in twelve minutes, and can be cut off at any point."
        ]
    settings = [(shape, pixels, batch, "bfloat16") for shape in SHAPES for pixels in (224, 518) for batch in (1, 32)]
    lines: list[str] = []
    for mode in ("", "default", "reduce-overhead"):
        lines += ["", f"### {mode or 'eager'}, bfloat16, sdpa", "", *forwards(settings, seconds, "cuda", mode)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        lines += ["", "### eager, bfloat16, flash attention", "", *forwards(settings, seconds, "cuda")]
    scanned = [("B", 224, 512, 64), ("B", 518, 128, 32), ("L", 518, 128, 32)]
    return [*lines, "", "### Scan, float32", "", *scans(scanned, seconds, "cuda")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes only: a few minutes")
    parser.add_argument("--only", default="", help="sections whose title matches this regular expression")
    parser.add_argument("--seconds", type=float, help="for each row of a table (default: 20, quick: 3)")
    parser.add_argument("--out", type=Path, default=DOCS, help="where the tables go (default: docs/benchmarks.md)")
    given = parser.parse_args()
    if not os.environ.keys() >= KEEP.keys():  # an allocator reads them when a process begins
        os.execve(
            sys.executable, [sys.executable, "-m", "tests.benchmarks.speed", *sys.argv[1:]], {**os.environ, **KEEP}
        )
    logging.disable_progress_bar()
    quick, seconds = given.quick, given.seconds or (3 if given.quick else 20)

    small = [("Ti", 224, 1, "float32"), ("Ti", 224, 32, "float32"), ("B", 224, 8, "float32")]
    large = [
        ("B", 224, 1, "float32"),
        ("B", 224, 32, "float32"),
        ("L", 224, 1, "float32"),
        ("L", 224, 8, "float32"),
        *((shape, 518, 1, "float32") for shape in SHAPES),
        *((shape, 224, 1, "bfloat16") for shape in SHAPES),
        ("Ti", 224, 32, "bfloat16"),
        ("B", 224, 8, "bfloat16"),
    ]
    sections: dict[str, Callable[[], list[str]]] = {
        "Forward passes, eager": lambda: forwards(small, seconds),
        "Forward passes of a real checkpoint, eager": lambda: found(seconds),
        "Page faults": lambda: faults([("B", 224, 8)], seconds),
        "Where the time of a patch goes": lambda: pieces([("Ti", 224, 1), ("B", 224, 8)], seconds),
        "Forward passes, torch.compile": lambda: forwards(small[: 1 if quick else 3], seconds, mode="default"),
        "Graph breaks": breaks,
        "Larger forward passes, eager": lambda: forwards(large, seconds),
        "The largest, eager": lambda: forwards([("L", 224, 32, "float32")], seconds),
        "Peak memory of forward passes": lambda: memories([("B", 224, 8)] if quick else [("B", 224, 8), ("B", 518, 4)]),
        "Scan": lambda: scans([("Ti", 224, 64, 16)] + ([] if quick else [("B", 518, 8, 4)]), seconds),
        "Memory of the scan": lambda: lasting((10, 64, 256) if quick else (10, 64, 1000)),
        "Find": lambda: finds((64,) if quick else (64, 256, 1000), seconds),
        "Checkpoints": lambda: checkpoints(["Ti", "B"], seconds),
        "Growth": lambda: growth(seconds / 2),
        "CUDA": lambda: cuda(seconds),
    }
    command = " ".join(["python -m tests.benchmarks.speed", *sys.argv[1:]])
    done = earlier(given.out)
    for title, section in sections.items():
        if re.search(given.only, title) and not (quick and title in LONG):
            done[title] = [f"`{command}`", "", *section()]
            lines = ["# Benchmarks", "", *str(__doc__).strip().splitlines(), "", machine()]
            for name in filter(done.__contains__, sections):
                lines += ["", f"## {name}", "", *done[name]]
            given.out.write_text("\n".join(lines).rstrip() + "\n")  # what there is so far


def earlier(file: Path) -> dict[str, list[str]]:
    """The sections that an earlier run wrote, which stay where they are not run again."""
    parts = file.read_text().split("\n## ")[1:] if file.exists() else []
    return {part.split("\n")[0]: part.rstrip().split("\n")[2:] for part in parts}


if __name__ == "__main__":
    main()
