"""ONNX export in int8: ONNX Runtime's static quantiser, on a model in which nothing is an outlier any more."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..finding.observe import unpatched
from ..images.streaming import ImageStream, stream
from ..runtime.errors import BadCheckpoint, BadImages, Harmful, TestregError
from ..runtime.installer import active, patch
from ..runtime.modeling_testreg import load
from . import graph as graphs
from .checking import Check, check, guilty
from .onnx import NORMS, Plain, free, of_images, session_of, traced
from .rest import put_at_rest

FEWEST = 8  # images to calibrate on, and as many to check with
HELD_OUT = 3  # every third image is
LEAST = 0.95  # of the cosine between int8 and float


@dataclass(frozen=True)
class Target:
    """What the processor that a file is meant for computes well.

    Attributes:
        activations, weights: types of ONNX Runtime's quantiser.
        options: more of them.
    """

    activations: str
    weights: str
    options: tuple[tuple[str, Any], ...] = ()


TARGETS = {
    # Products of U8 and S8 are summed by pairs in 16 bits on x86 before VNNI, where they saturate; U8 and U8 are not.
    "any": Target("QUInt8", "QUInt8"),
    "vnni": Target("QUInt8", "QInt8"),
    "arm": Target("QInt8", "QInt8"),
    "tensorrt": Target("QInt8", "QInt8", (("ActivationSymmetric", True), ("WeightSymmetric", True))),
}
CALIBRATIONS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}


@dataclass(frozen=True)
class Int8:
    """How to quantise; the defaults are safe wherever the file runs, and need no other.

    Attributes:
        target: a key of `TARGETS`. "any" is exact on every processor; "vnni" is faster on x86 from Ice Lake and Zen 4
            on, and wrong before; "arm" and "tensorrt" are as these want it.
        operators: "linears", where nearly all of the time goes, or "all" that ONNX Runtime's quantiser knows.
        calibration: where ranges end: "minmax", at the extremes; "percentile", beyond 99.999 % of the values;
            "entropy", where the histogram loses least.
        per_tensor: one scale for each weight, not for each of its output channels.
        keep: what stays in float: patterns of module names, as in `"*.layers.0.*"`, or operators, as in `"Softmax"`.
        even: give the channels in front of linears sizes that one scale can hold, in the weights.
    """

    target: str = "any"
    operators: str = "linears"
    calibration: str = "minmax"
    per_tensor: bool = False
    keep: tuple[str, ...] = ()
    even: bool = True

    def __post_init__(self) -> None:
        for name, known in (("target", TARGETS), ("calibration", CALIBRATIONS), ("operators", ("linears", "all"))):
            if getattr(self, name) not in known:
                raise TestregError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(known)}.")


def export_int8(
    model: nn.Module | str | Path,
    images: Any,
    file: str | Path,
    *,
    held_out: Any = None,
    how: Int8 | None = None,
    processor: Callable[..., Any] | None = None,
    batch_size: int = 8,
    force: bool = False,
    replace: bool = False,
) -> Check:
    """Write `model` as ONNX in int8, and compare it with itself in float, both without and with its registers.

    Args:
        model: patched with registers that only attention sees, or not patched; or the directory or hub name of a
            checkpoint. It is not changed. Of a model that also reads text, the vision tower is exported.
        images: photos, as `testreg.find` takes them, which can be gone through several times; one at a time is in
            memory. Ranges come from two thirds of them, the comparison from the others.
        file: `NAME.onnx`.
        held_out: photos to compare on; then ranges come from all `images`.
        how: by default what is right on every processor.
        force: write it, however far it is from the float model.
        replace: overwrite what is there.

    Returns:
        What the comparison found.

    Raises:
        BadCheckpoint: the file exists, or cannot be written; nothing is changed.
        BadImages: there are too few images, or they come in several sizes.
        Harmful: int8 changes the model too much; the message has the numbers and the layers, and nothing is written.
        UnsupportedModel: the model cannot be traced.
        TestregError: onnx, onnxscript or onnxruntime is not installed.
    """
    target, data = free(file, replace)
    how = how or Int8()
    loaded: Any = of_images(model if isinstance(model, nn.Module) else load(model))
    seen = Photos(images, processor, loaded, batch_size, held_out)
    current = active(loaded)
    plan = current.plan if current else None
    if plan is not None and plan.form != "attention":
        raise TestregError(
            f"the registers are of the {plan.form} form, and carry the outlier through every linear, so that int8 gains "
            f"nothing by them. testreg.find(model, images) gives registers that only attention sees."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            files: dict[str, Path] = {}
            with unpatched(loaded):
                plain = copy.deepcopy(loaded)
            files |= _both(plain, Path(folder), "unpatched", seen, how)
            if plan is not None:
                left = put_at_rest(plain, plan, {"pixel_values": seen.example})
                patch(plain, left)
                files |= _both(plain, Path(folder), "patched", seen, how)
            found = check(files, seen.held_out())
            _refuse(found, files, seen, force)
            best = _without(list(files.values())[-1], NORMS)
            os.replace(best, target)
            data.unlink(missing_ok=True)  # the weights of the file that is no more
    except OSError as error:
        raise BadCheckpoint(f"{file} could not be written: {error}.") from error
    return found


class Photos:
    """Batches to calibrate on and to compare on, streamed again whenever they are asked for."""

    def __init__(self, images: Any, processor: Any, model: nn.Module, batch_size: int, held_out: Any):
        def streamed(source: Any) -> ImageStream:
            return stream(source, processor, model=model, batch_size=batch_size)

        self.all, self.apart = streamed(images), None if held_out is None else streamed(held_out)
        counts = [0, 0]
        first: Tensor | None = None
        for side, batches in enumerate((self.calibration(), self.held_out())):
            for batch in batches:
                first = batch if first is None else first
                if batch.shape[1:] != first.shape[1:]:
                    raise BadImages(
                        f"the images come as {tuple(first.shape[1:])} and as {tuple(batch.shape[1:])}, but an ONNX "
                        f"file is for one size: pass a processor that crops them all alike."
                    )
                counts[side] += len(batch)
        if first is None or min(counts) < FEWEST:
            raise BadImages(
                f"there are {counts[0]} images to calibrate on and {counts[1]} to compare on; at least {FEWEST} of "
                f"each are needed, and some 64 of each are better."
            )
        self.images = tuple(counts)
        self.example = first[:2] if len(first) > 1 else first.repeat(2, 1, 1, 1)

    def calibration(self) -> Iterator[Tensor]:
        """`pixel_values (images, channels, height, width)`."""
        return self._of(self.all, None if self.apart else False)

    def held_out(self) -> Iterator[Tensor]:
        return self._of(self.apart, None) if self.apart else self._of(self.all, True)

    def _of(self, batches: ImageStream, held: bool | None) -> Iterator[Tensor]:
        for batch in batches:
            chosen = [held is None or (int(name, 16) % HELD_OUT == 0) == held for name in batch.digests]
            if any(chosen):
                yield batch.inputs["pixel_values"][torch.tensor(chosen)].float()


def _both(model: nn.Module, folder: Path, name: str, seen: Photos, how: Int8) -> dict[str, Path]:
    """The model as it is, in float and in int8, with the norms of its patches as one more output."""
    import onnx_ir as ir

    plain = Plain(copy.deepcopy(model), torch.float32, norms=True).eval()
    program, _ = traced(plain, seen.example)
    graph = program.model.graph
    real, even, whole = (folder / f"{name}{kind}.onnx" for kind in ("", ".even", ".int8"))
    graphs.lift_rows(graph)
    graphs.name_linears(graph)
    ir.save(program.model, real)
    if how.even:
        graphs.even_out(graph, _largest(real, graphs.norms(graph), seen.calibration()))
    ir.save(program.model, even)
    quantise(even, whole, seen.calibration, how)
    return {f"{name}, float": real, f"{name}, int8": whole}


def _largest(file: Path, outputs: list[str], batches: Iterable[Tensor]) -> dict[str, np.ndarray]:
    """The largest magnitude of each channel of the named outputs `(batch, tokens, channels)`."""
    import onnx_ir as ir

    model = ir.load(file)
    values = {node.outputs[0].name: node.outputs[0] for node in model.graph}
    model.graph.outputs.extend(values[name] for name in outputs)
    watched = file.with_suffix(".watched.onnx")
    ir.save(model, watched)
    session, found = session_of(watched), dict.fromkeys(outputs, np.zeros(1, np.float32))
    for batch in batches:
        for name, value in zip(outputs, session.run(outputs, {"pixel_values": batch.numpy()}), strict=True):
            found[name] = np.maximum(found[name], np.abs(value).reshape(-1, value.shape[-1]).max(0))
    watched.unlink()
    return found


def quantise(file: Path, out: Path, batches: Callable[[], Iterator[Tensor]], how: Int8) -> None:
    """ONNX Runtime's static quantiser, in QDQ format, on a graph whose linears are named."""
    import onnx_ir as ir
    from onnxruntime import quantization as ort  # type: ignore[import-untyped]

    graph, target = ir.load(file).graph, TARGETS[how.target]
    linears = [node.name for node in graphs.linears(graph)]
    kept = [
        node.name
        for node in graph
        if any(fnmatch(node.name, pattern) or node.op_type == pattern for pattern in how.keep)
    ]
    only = {"nodes_to_quantize": linears, "op_types_to_quantize": ["MatMul", "Gemm"]}
    options: dict[str, Any] = dict(target.options)
    if how.operators == "linears":
        options["OpTypesToExcludeOutputQuantization"] = ["MatMul", "Gemm"]
    if how.calibration != "minmax":
        options["CalibStridedMinMax"] = 1  # a histogram of one batch at a time, or all would be kept
    with contextlib.redirect_stdout(io.StringIO()):
        ort.quantize_static(
            file,
            out,
            _reader(batches),
            quant_format=ort.QuantFormat.QDQ,
            per_channel=not how.per_tensor,
            activation_type=ort.QuantType[target.activations],
            weight_type=ort.QuantType[target.weights],
            nodes_to_exclude=kept,
            calibrate_method=ort.CalibrationMethod[CALIBRATIONS[how.calibration]],
            extra_options=options,
            **(only if how.operators == "linears" else {}),
        )


def _reader(batches: Callable[[], Iterator[Tensor]]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Batches as ONNX Runtime reads them: all, or, where it strides, as many as it asks for."""

        def __init__(self) -> None:
            self.batches, self.left = batches(), -1

        def __len__(self) -> int:
            return sum(1 for _ in batches())

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = end_index - start_index

        def get_next(self) -> dict[str, np.ndarray] | None:
            if self.left == 0:
                return None
            self.left -= 1
            batch = next(self.batches, None)
            return None if batch is None else {"pixel_values": batch.numpy()}

    return Reader()


def _refuse(found: Check, files: dict[str, Path], seen: Photos, force: bool) -> None:
    best, real = found.sides[-1], found.sides[-2]
    if best.kept >= LEAST or force:
        return
    layers = guilty(files[real.name], files[best.name], next(seen.held_out()))
    advice = "Find registers first: testreg patch." if len(found.sides) == 2 else "Keep some layers in float (keep)."
    raise Harmful(
        f"int8 changes the model too much: its output has a cosine of {best.kept:.3f} with that in float, and "
        f"{LEAST} is needed; the same top-1 answer {best.same:.1%}. A typical token loses most in front of "
        f"{', '.join(f'{name} ({share:.0%})' for name, share in layers)}. {advice} Nothing was written."
    )


def _without(file: Path, output: str) -> Path:
    """The file without an output that only checks read."""
    import onnx_ir as ir

    model = ir.load(file)
    for value in [value for value in model.graph.outputs if value.name == output]:
        model.graph.outputs.remove(value)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    bare = file.with_suffix(".bare.onnx")
    ir.save(model, bare)
    return bare
