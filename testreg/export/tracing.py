"""A model as an ONNX program: images in, tensors out, in batches of any size."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..finding.observe import observe
from ..finding.still import still
from ..runtime.errors import TestregError, UnsupportedModel
from ..runtime.paths import reach
from ..runtime.towers import find_tower

NORMS = "patch_norms"  # of the output that only checks read


class Plain(nn.Module):
    """Images in, a tuple of tensors out.

    Args:
        norms: also give the norms of the patches after every block, `(batch, blocks, patches)`.
    """

    def __init__(self, model: Any, dtype: torch.dtype, *, norms: bool = False):
        super().__init__()
        self.inner: Any = model.to("cpu", dtype)
        self.norms = norms

    def still(self) -> AbstractContextManager[None]:
        try:
            return still(self, find_tower(self.inner))
        except UnsupportedModel:  # of no known family, so nothing is known of what it draws
            return still(self)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named(pixel_values).values())

    def named(self, pixel_values: Tensor) -> dict[str, Tensor]:
        if not self.norms:
            return _named(self.inner(pixel_values))
        tower = find_tower(self.inner)
        with observe(self.inner, states=range(len(tower.blocks))) as seen:
            named = _named(self.inner(pixel_values))
        states = [seen.states[block][:, tower.prefix :] for block in sorted(seen.states)]
        return {**named, NORMS: torch.stack([state.norm(dim=-1) for state in states], dim=1)}


def traced(plain: Plain, example: Tensor) -> tuple[Any, list[str]]:
    """The ONNX program of `plain` for images like `example` in batches of any size, and the names of its outputs.

    Raises:
        UnsupportedModel: it cannot be traced, or needs operators that ONNX has not.
    """
    kind = type(plain.inner).__name__
    with plain.still():
        names = list(plain.named(example))
        try:
            program = torch.onnx.export(
                plain,
                (example,),
                dynamo=True,
                input_names=["pixel_values"],
                output_names=names,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                custom_translation_table={torch.ops.aten.index_copy.default: _index_copy()},
                verbose=False,
            )
        except Exception as error:  # whatever tracing raises
            raise UnsupportedModel(
                f"{kind} cannot be exported to ONNX: {str(error).strip().splitlines()[0]}"
            ) from error
    assert program is not None
    foreign = {node.domain for node in program.model.graph.all_nodes()} - {"", "ai.onnx"}
    if foreign:
        raise UnsupportedModel(f"{kind} needs operators that ONNX has not: {', '.join(foreign)}.")
    return program, names


def _named(output: Any) -> dict[str, Tensor]:
    if isinstance(output, Tensor):
        return {"output": output}
    named: dict[str, Tensor] = {}
    for name, value in output.items() if isinstance(output, Mapping) else enumerate(output):
        values = value if isinstance(value, (tuple, list)) else [value]
        for index, tensor in enumerate(values):
            if isinstance(tensor, Tensor):
                named[str(name) if len(values) == 1 else f"{name}_{index}"] = tensor
    return named


def _index_copy() -> Any:
    """How `index_copy` is written in ONNX: take from `[self | source]`, by indices that are constants.

    PyTorch's own translation is a ScatterND, on which ONNX Runtime 1.32 crashes in float16 on the CPU.
    """
    from onnxscript import opset18

    op: Any = opset18

    def translate(self: Any, dim: int, index: Any, source: Any) -> Any:
        size, count = op.Squeeze(op.Gather(op.Shape(self), [dim])), op.Squeeze(op.Shape(index))
        order = op.ScatterElements(op.Range(0, size, 1), index, op.Range(size, op.Add(size, count), 1))
        return op.Gather(op.Concat(self, source, axis=dim), order, axis=dim)

    return translate


def of_images(model: nn.Module) -> Any:
    """The model, or its vision tower where it reads text as well."""
    if getattr(model, "main_input_name", "pixel_values") == "pixel_values":
        return model
    return find_tower(model).module


def shape_of(model: Any, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """Channels, height and width of the images that the model is made for."""
    timm = getattr(model, "pretrained_cfg", None) or reach(model, "timm_model.pretrained_cfg")
    if timm:
        channels, *sides = timm["input_size"]
        grid = reach(model, "patch_embed.img_size") or reach(model, "timm_model.patch_embed.img_size")
        height, width = size or grid or sides
        return channels, height, width
    config: Any = reach(model, "config") or reach(find_tower(model).module, "config")
    config = getattr(config, "vision_config", config)
    given = size or reach(config, "image_size") or 224
    height, width = (given, given) if isinstance(given, int) else given
    return reach(config, "num_channels") or 3, height, width


def session_of(file: str | Path) -> Any:
    """The file, ready to run in ONNX Runtime on the CPU."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def needs(*packages: str) -> None:
    missing = []
    for package in packages:
        try:
            __import__(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise TestregError(f"ONNX export needs {', '.join(missing)}: pip install {' '.join(missing)}.")
