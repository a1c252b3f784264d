"""A model's ONNX files, in float and in int8, side by side on the same photos."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..finding.trial import Threshold
from ..metrics.agreement import agreement
from .graph import constant, linears
from .tracing import NORMS, session_of

USUAL = Threshold(4.0)  # from which norm on a patch is an outlier, as a multiple of its image's median
ANSWERS = ("logits", "image_embeds", "output", "pooler_output")


@dataclass(frozen=True)
class Side:
    """One file.

    Attributes:
        agreement: share of photos whose largest entry of the output is that of the first file, the model as it came.
        cosine: of the output with that of the first file.
        same, kept: both with the file's own float; 1 for a file in float.
        patches: cosine of the patches' last state with its own float; None where the file gives none.
        outliers: share of patches after the block where they stand out most in the first file.
        size: bytes.
        time: seconds per photo.
    """

    name: str
    agreement: float
    cosine: float
    same: float
    kept: float
    patches: float | None
    outliers: float
    size: int
    time: float


@dataclass(frozen=True)
class Check:
    """What was found: the model as it came first, then with registers if it has some; in float and in int8, by turns.

    Attributes:
        images: how many photos were compared.
        processor: what the machine's processor calls itself, since times are its own.
        calibrated: how many photos the ranges are from.
        about: a sentence about the registers.
    """

    sides: tuple[Side, ...]
    images: int
    processor: str
    calibrated: int = 0
    about: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass
class _Sums:
    answers: list[Tensor]
    patches: list[Tensor]
    norms: list[Tensor]
    time: float = 0.0


def check(files: Mapping[str, Path], batches: Iterable[Tensor]) -> Check:
    """Run all `files` on the same photos.

    Args:
        files: by name, float and int8 by turns.
        batches: `pixel_values (images, channels, height, width)`.
    """
    sessions = {name: session_of(file) for name, file in files.items()}
    sums = {name: _Sums([], [], []) for name in files}
    names, images, warm = list(files), 0, False
    for batch in batches:
        images += len(batch)
        whole: dict[str, dict[str, Tensor]] = {}
        for name, session in sessions.items():
            outputs = [output.name for output in session.get_outputs()]
            if not warm:
                session.run(outputs, {"pixel_values": batch.numpy()})
            begun = time.perf_counter()
            values = session.run(outputs, {"pixel_values": batch.numpy()})
            sums[name].time += time.perf_counter() - begun
            whole[name] = {key: torch.from_numpy(value).float() for key, value in zip(outputs, values, strict=True)}
        warm = True
        for index, (name, given) in enumerate(whole.items()):
            real = whole[names[index - index % 2]]
            sums[name].answers.append(_answer(given))
            sums[name].norms.append(given[NORMS])
            if "last_hidden_state" in given:
                count = given[NORMS].shape[-1]
                ours, theirs = (side["last_hidden_state"][:, -count:] for side in (given, real))
                sums[name].patches.append(cosine_similarity(ours, theirs, dim=-1).mean(-1))
    first = torch.cat(sums[names[0]].norms)  # (images, blocks, patches)
    block = int((first.amax(-1) / first.median(-1).values).mean(0).argmax())
    sides = []
    for index, (name, found) in enumerate(sums.items()):
        answers = torch.cat(found.answers)
        came = agreement(answers, torch.cat(sums[names[0]].answers))
        own = agreement(answers, torch.cat(sums[names[index - index % 2]].answers))
        outliers = torch.stack([USUAL.outliers(norms) for norms in torch.cat(found.norms)[:, block]])
        sides.append(
            Side(
                name=name,
                agreement=float(came.same.float().mean()),
                cosine=float(came.cosine.mean()),
                same=float(own.same.float().mean()),
                kept=float(own.cosine.mean()),
                patches=float(torch.cat(found.patches).mean()) if found.patches else None,
                outliers=float(outliers.float().mean()),
                size=files[name].stat().st_size,
                time=found.time / images,
            )
        )
    return Check(tuple(sides), images, processor_name())


def _answer(outputs: Mapping[str, Tensor]) -> Tensor:
    """What the model says of each image as a whole `(batch, channels)`."""
    for name in ANSWERS:
        if name in outputs and outputs[name].ndim == 2:
            return outputs[name]
    for name, value in outputs.items():
        if name != NORMS and value.ndim == 3:
            return value.mean(1)
    return next(value for name, value in outputs.items() if name != NORMS).flatten(2).mean(-1)


def processor_name() -> str:
    """What the machine's processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def guilty(real: Path, int8: Path, batch: Tensor, most: int = 3) -> list[tuple[str, float]]:
    """The linears whose quantised input loses most of a typical token: names, and shares of the token's norm.

    Args:
        real, int8: the same graph in float and in int8.
        batch: a few images.
    """
    import onnx_ir as ir

    model, scales = ir.load(real), _scales(int8)
    inputs = {node.name: node.inputs[0] for node in linears(model.graph) if node.name in scales}
    wanted = list(dict.fromkeys(value for value in inputs.values()))
    known = set(model.graph.outputs)
    model.graph.outputs.extend(value for value in wanted if value not in known)
    watched = real.with_suffix(".inputs.onnx")
    ir.save(model, watched)
    names = [value.name for value in wanted]
    values = dict(zip(names, session_of(watched).run(names, {"pixel_values": batch.numpy()}), strict=True))
    losses = {}
    for name, value in inputs.items():
        scale, zero, (low, high) = scales[name]
        tokens = values[value.name].reshape(-1, values[value.name].shape[-1])
        held = (np.clip(np.round(tokens / scale) + zero, low, high) - zero) * scale
        losses[name] = float(np.median(np.linalg.norm(tokens - held, axis=-1) / np.linalg.norm(tokens, axis=-1)))
    return sorted(losses.items(), key=lambda item: -item[1])[:most]


def _scales(file: Path) -> dict[str, tuple[float, float, tuple[int, int]]]:
    """Linear -> scale, zero point and ends of its quantised input."""
    import onnx_ir as ir

    found: dict[str, tuple[float, float, tuple[int, int]]] = {}
    for node in ir.load(file).graph:
        made = node.inputs[0].producer() if node.op_type in ("MatMul", "Gemm") and node.inputs[0] else None
        if made is not None and made.op_type == "DequantizeLinear" and node.name:
            scale, zero = constant(made.inputs[1]), constant(made.inputs[2])
            if scale is not None and zero is not None and scale.ndim == 0:
                ends = np.iinfo(zero.dtype)
                found[node.name] = float(scale), float(zero), (ends.min, ends.max)
    return found
