"""What registers cost on a GPU: `python -m tests.benchmarks.gpu --out gpu.json`, in twelve minutes or fewer.

A list of jobs, the most telling first, each of seconds: ViT-B and L at 224 and 518 px in bfloat16 and float16, with the
attention kernel that PyTorch picks and with flash attention, eager and compiled with CUDA graphs; int8 by torchao;
ONNX, plain and int8, on the processor of the same machine; `find` at 1,000 images; all forms side by side. The file is
written anew after every job, so it can be cut off at any point: the same command goes on behind the jobs that are
there. No job is begun after `--minutes`. What cannot run (no torchao, too little memory) is a row with its reason.

    python -m tests.benchmarks.gpu --only "find|int8"  # the jobs whose names hold that; a regular expression
    python -m tests.benchmarks.gpu --table gpu.json    # the rows as Markdown, for docs/benchmarks.md

`--device cpu --quick` tries all of it on a tiny model without a GPU; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cosine_similarity

import testreg
from testreg.checkpoints.atomic import replacing_file
from testreg.demo.planted import plant
from tests.benchmarks.speed import again, machine, over, paired, plans, twin, vit

REGISTERS = 4
Job = tuple[str, Callable[[], list[dict[str, Any]]]]


def arms_of(shape: str, pixels: int, device: str, dtype: torch.dtype, forms: tuple[str, ...]) -> dict[str, nn.Module]:
    """The same weights unpatched, in some forms, and where registers are part of the architecture."""
    base = vit(shape, pixels).to(device, dtype)
    models = {"unpatched": base, "unpatched again": again(base)}
    for form in forms:
        models[form] = again(base)
        testreg.patch(models[form], plans(shape, REGISTERS)[form])
    models["native"] = twin(base, shape, pixels, REGISTERS).to(device, dtype)
    return models


def rows_of(models: dict[str, Any], images: Tensor, seconds: float, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Median milliseconds of each arm, and over the unpatched one in the same turns."""

    def arm(model: Any) -> Callable[[], Any]:
        def forward() -> None:
            with torch.inference_mode():
                model(images)
            if images.is_cuda:
                torch.cuda.synchronize()

        for _ in range(2):
            forward()
        return forward

    taken = paired({name: arm(model) for name, model in models.items()}, seconds, 5)
    return [
        {
            **about,
            "arm": name,
            "ms": round(1000 * statistics.median(wall for wall, _ in times), 3),
            "over unpatched": over(taken, name, "unpatched")[0],
        }
        for name, times in taken.items()
    ]


def forward(
    shape: str, pixels: int, batch: int, dtype: str, kernel: str, mode: str, device: str, seconds: float
) -> list[dict[str, Any]]:
    forms = ("dynamic", "constant", "attention")
    models: dict[str, Any] = arms_of(shape, pixels, device, getattr(torch, dtype), forms)
    if mode:
        torch.compiler.reset()
        models = {name: torch.compile(model, mode=mode, fullgraph=True) for name, model in models.items()}
    images = torch.randn(batch, 3, pixels, pixels).to(device, getattr(torch, dtype))
    about = {"what": f"ViT-{shape}, {batch} × {pixels} px, {dtype}", "how": ", ".join(filter(None, (mode, kernel)))}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if kernel == "flash" else nullcontext():
        return rows_of(models, images, seconds, about)


def int8(shape: str, pixels: int, batch: int, device: str, seconds: float) -> list[dict[str, Any]]:
    """Weights and activations in int8 by torchao, compiled; and how far that takes the output."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    images = torch.randn(batch, 3, pixels, pixels).to(device, torch.bfloat16)
    models: dict[str, Any] = {}
    told: dict[str, float] = {}
    for name, model in arms_of(shape, pixels, device, torch.bfloat16, ("attention",)).items():
        if name not in ("unpatched", "attention"):
            continue
        own = vit(shape, pixels).to(device, torch.bfloat16)  # quantising replaces weights, so each arm has its own
        if name == "attention":
            testreg.patch(own, plans(shape, REGISTERS)["attention"])
        with torch.inference_mode():
            before = model(images).last_hidden_state.float()
        quantize_(own, Int8DynamicActivationInt8WeightConfig())
        with torch.inference_mode():
            told[name] = float(cosine_similarity(own(images).last_hidden_state.float(), before, dim=-1).mean())
        models[name] = torch.compile(own) if device == "cuda" else own
        models[f"{name}, bfloat16"] = torch.compile(model) if device == "cuda" else model
    torch.compiler.reset()
    about = {"what": f"ViT-{shape}, {batch} × {pixels} px", "how": "int8 by torchao"}
    rows = rows_of(models, images, seconds, about)
    return [{**row, **({"cosine": round(told[row["arm"]], 5)} if row["arm"] in told else {})} for row in rows]


def onnx(shape: str, pixels: int, seconds: float) -> list[dict[str, Any]]:
    """ONNX on the processor, float32 and int8 weights."""
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    from testreg.export.onnx import export_onnx

    model, arms = vit(shape, pixels), {}
    images = torch.randn(1, 3, pixels, pixels)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("unpatched", "attention"):
            patched = again(model)
            if name == "attention":
                testreg.patch(patched, plans(shape, REGISTERS)["attention"])
            file = export_onnx(patched, Path(folder, f"{name}.onnx"), size=(pixels, pixels))
            quantize_dynamic(file, Path(folder, f"{name}-int8.onnx"))
            for kind, path in (("", file), (", int8", Path(folder, f"{name}-int8.onnx"))):
                session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
                given = {session.get_inputs()[0].name: images.numpy()}
                arms[f"{name}{kind}"] = partial(session.run, None, given)
        taken = paired(arms, seconds, 3)
    return [
        {
            "what": f"ViT-{shape}, 1 × {pixels} px", "how": "ONNX Runtime, CPU", "arm": name,
            "ms": round(1000 * statistics.median(wall for wall, _ in times), 3),
            "over unpatched": over(taken, name, "unpatched")[0],
        }
        for name, times in taken.items()
    ]  # fmt: skip


def find(shape: str, pixels: int, count: int, batch: int, device: str) -> list[dict[str, Any]]:
    """The whole of `find` against one plain pass over the same images."""
    model = vit(shape, pixels)
    plant(model, neurons=3, where="corners")
    model.to(device)
    images = torch.randn(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    taken = {}
    for name in ("plain pass", "find"):
        begin = time.perf_counter()
        if name == "find":
            plan = testreg.find(model, images, batch_size=batch, force=True)
        else:
            with torch.inference_mode():
                for part in images.split(batch):
                    model(part.to(device))
        if device == "cuda":
            torch.cuda.synchronize()
        taken[name] = time.perf_counter() - begin
    return [
        {
            "what": f"ViT-{shape}, {count} images of {pixels} px, float32", "how": str(plan).split(";")[0], "arm": name,
            "ms": round(1000 * seconds), "over plain pass": round(seconds / taken["plain pass"], 2),
        }
        for name, seconds in taken.items()
    ]  # fmt: skip


def jobs(device: str, quick: bool, seconds: float) -> Iterator[Job]:
    shapes, sides, batch = (("Ti",), (56,), 2) if quick else (("B", "L"), (224, 518), 32)
    graphs = "reduce-overhead" if device == "cuda" else "default"
    for dtype, kernel in (("bfloat16", "sdpa"), ("bfloat16", "flash"), ("float16", "sdpa"), ("float16", "flash")):
        for shape, side in product(shapes, sides):
            yield (
                f"forward {shape} {side} {dtype} {kernel}",
                partial(forward, shape, side, batch, dtype, kernel, "", device, seconds),
            )
        if (dtype, kernel) == ("bfloat16", "sdpa"):
            for shape, side in product(shapes, sides):
                yield (
                    f"graphs {shape} {side}",
                    partial(forward, shape, side, batch, dtype, kernel, graphs, device, seconds),
                )
            yield "find", partial(find, shapes[0], sides[0], 12 if quick else 1000, 2 if quick else 64, device)
            yield "int8", partial(int8, shapes[0], sides[0], batch, device, seconds)
            yield "onnx", partial(onnx, shapes[0], sides[0], seconds)
            yield "forward alone", partial(forward, shapes[0], sides[0], 1, dtype, kernel, "", device, seconds)


def save(done: dict[str, Any], out: Path) -> None:
    with replacing_file(out) as build:
        build.write_text(json.dumps(done, indent=1) + "\n")


def markdown(done: dict[str, Any]) -> str:
    """A row for each model and way, with every arm over the unpatched one; then what did not run, and why."""
    rows = [row for job in done["jobs"].values() for row in job]
    arms = list(dict.fromkeys(row["arm"] for row in rows if "over unpatched" in row and row["arm"] != "unpatched"))
    ways: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if "over unpatched" in row:
            ways.setdefault((row["what"], row["how"]), {})[row["arm"]] = row
    head = f"| model | how | unpatched, ms | {' | '.join(arms)} |"
    lines = [done["machine"], "", head, f"|{'---|' * (3 + len(arms))}"]
    for (what, how), found in ways.items():
        cells = (found.get(arm, {}).get("over unpatched", "") for arm in arms)
        lines.append(f"| {what} | {how} | {found['unpatched']['ms']:.2f} | {' | '.join(cells)} |")
    others = [row for row in rows if "over unpatched" not in row]
    lines += ["", *(f"- {', '.join(f'{key}: {value}' for key, value in row.items())}" for row in others)]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=11.0)
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring in each job")
    parser.add_argument("--only", default="", help="jobs whose names match this regular expression")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", type=Path, help="print a file's rows as Markdown, and measure nothing")
    given = parser.parse_args(arguments)
    if given.table:
        return print(markdown(json.loads(given.table.read_text())), end="")
    if given.device == "cuda" and not torch.cuda.is_available():
        return print("GPU: not run, since this machine has no CUDA device.")
    end = time.monotonic() + 60 * given.minutes
    done: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {"jobs": {}}
    done["machine"] = machine()
    for name, job in jobs(given.device, given.quick, given.seconds):
        if not re.search(given.only, name) or any("reason" not in row for row in done["jobs"].get(name, ())):
            continue
        if time.monotonic() > end:
            print(f"{name}: not begun, the {given.minutes:g} minutes are over", flush=True)
            continue
        begin = time.monotonic()
        try:
            done["jobs"][name] = job()
        except Exception as error:  # no such package, no such kernel, too little memory: the others go on
            words = (str(error).strip().splitlines() or [""])[0]
            done["jobs"][name] = [{"what": name, "reason": f"{type(error).__name__}: {words}"[:200]}]
        save(done, given.out)
        print(f"{name}: {time.monotonic() - begin:.0f} s, {done['jobs'][name]}", flush=True)
        if given.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
