"""ONNX Runtime's static quantiser, and what can be said to it."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..finding.evening import Seen
from ..runtime.errors import TestregError
from . import graph as graphs
from .tracing import session_of

Batches = Callable[[], Iterator[Tensor]]


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
OPERATORS = ("linears", "all")


@dataclass(frozen=True)
class Int8:
    """How to quantise; the defaults are right wherever the file runs, and need no other.

    Attributes:
        target: "any" is exact on every processor; "vnni" is faster on x86 from Ice Lake and Zen 4 on, and wrong before,
            where sums of products saturate; "arm" and "tensorrt" are as these want it.
        operators: "linears", where nearly all of the time goes, or "all" that ONNX Runtime's quantiser knows.
        calibration: where ranges end: "minmax", at the extremes; "percentile", beyond 99.999 % of the values;
            "entropy", where the histogram loses least.
        per_tensor: one scale for each weight, not for each of its output channels.
        keep: what stays in float: patterns of module names, as in `"*.layers.0.*"`, or operators, as in `"Softmax"`.
        even: give channels and tokens in front of linears sizes that one scale can hold (see
            `testreg.finding.evening`); None = where linears alone are quantised: between other operators it brings
            nothing.

    Raises:
        TestregError: a value is none of these.
    """

    target: str = "any"
    operators: str = "linears"
    calibration: str = "minmax"
    per_tensor: bool = False
    keep: tuple[str, ...] = ()
    even: bool | None = None

    @property
    def evens(self) -> bool:
        """Whether channels are evened out."""
        return self.operators == "linears" if self.even is None else self.even

    def __post_init__(self) -> None:
        for name, known in (("target", TARGETS), ("calibration", CALIBRATIONS), ("operators", OPERATORS)):
            if getattr(self, name) not in known:
                raise TestregError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(known)}.")
        if isinstance(self.keep, str):
            raise TestregError(f"keep is the text {self.keep!r}: give a tuple of patterns, as in ({self.keep!r},).")


def quantise(file: Path, out: Path, batches: Batches, how: Int8) -> None:
    """Write the int8 form of a graph whose linears are named, in QDQ format.

    Raises:
        TestregError: a pattern of what to keep in float fits nothing.
    """
    import onnx_ir as ir
    from onnxruntime import quantization as ort  # type: ignore[import-untyped]

    graph, target = ir.load(file).graph, TARGETS[how.target]
    linears = [node.name for node in graphs.linears(graph)]
    options: dict[str, Any] = dict(target.options)
    only: dict[str, Any] = {}
    if how.operators == "linears":
        only = {"nodes_to_quantize": linears, "op_types_to_quantize": ["MatMul", "Gemm"]}
        options["OpTypesToExcludeOutputQuantization"] = ["MatMul", "Gemm"]
    if how.calibration != "minmax":
        options["CalibStridedMinMax"] = 1  # a histogram of one batch at a time, or all would be kept
    with _silent():
        ort.quantize_static(
            file,
            out,
            _reader(batches),
            quant_format=ort.QuantFormat.QDQ,
            per_channel=not how.per_tensor,
            activation_type=ort.QuantType[target.activations],
            weight_type=ort.QuantType[target.weights],
            nodes_to_exclude=_kept(graph, how.keep, linears),
            calibrate_method=ort.CalibrationMethod[CALIBRATIONS[how.calibration]],
            extra_options=options,
            **only,
        )


def watch(file: Path, outputs: list[str], batches: Iterable[Tensor]) -> dict[str, Seen]:
    """What a graph's named values `(batch, tokens, channels)` are on images."""
    import onnx_ir as ir

    model = ir.load(file)
    values = {node.outputs[0].name: node.outputs[0] for node in model.graph}
    model.graph.outputs.extend(values[name] for name in outputs)
    watched = file.with_suffix(".watched.onnx")
    ir.save(model, watched)
    session, found = session_of(watched), {name: Seen() for name in outputs}
    for batch in batches:
        for name, value in zip(outputs, session.run(outputs, {"pixel_values": batch.numpy()}), strict=True):
            for image in value if value.ndim > 2 else [value]:
                found[name].add(torch.from_numpy(image))  # (tokens, channels)
    watched.unlink()
    return found


def _kept(graph: Any, patterns: tuple[str, ...], linears: list[str]) -> list[str]:
    """The names of the nodes that patterns name, by themselves or by their operator."""
    kept = []
    for pattern in patterns:
        fitting = [node.name for node in graph if fnmatch(node.name, pattern) or node.op_type == pattern]
        if not fitting:
            raise TestregError(
                f"nothing is called {pattern!r} that could be kept in float: operators are "
                f"{', '.join(sorted({node.op_type for node in graph}))}; linears {', '.join(linears[:8])}, ..."
            )
        kept += fitting
    return kept


def _reader(batches: Batches) -> Any:
    from onnxruntime.quantization import CalibrationDataReader  # type: ignore[import-untyped]

    class Reader(CalibrationDataReader):
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


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what the quantiser prints and logs of each norm's weight, of which it expects to be a matrix."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
