"""ONNX export of a model with registers, patched or baked, checked in ONNX Runtime."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..finding.still import still
from ..runtime.errors import BadCheckpoint, Harmful, TestregError, UnsupportedModel
from ..runtime.modeling_testreg import load
from ..runtime.paths import reach
from ..runtime.towers import find_tower

BATCHES = (1, 8)  # sizes that the file is checked with; it takes any
# In float32 of the largest error, relative to the largest value or to 1; in float16 of the error's norm, relative to
# the output's.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}
WHOLE = 1_900_000_000  # bytes of weights up to which one file holds them; protobuf ends at 2 GiB


def export_onnx(
    model: nn.Module | str | Path,
    file: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    size: tuple[int, int] | None = None,
    replace: bool = False,
) -> Path:
    """Write `model` as ONNX, of standard operators only, for any batch size, and compare it with PyTorch.

    Args:
        model: patched, baked or neither; or the directory or hub name of a checkpoint that `testreg.save` wrote. It is
            not changed. Of a model that also reads text, the vision tower is exported; of one that masks random patches
            in evaluation mode too, as ViT-MAE does, what it makes of all of them.
        file: `NAME.onnx`; weights of more than 1.9 GB lie beside it, in `NAME.onnx.data`.
        dtype: float32 or float16, of weights and images.
        size: height and width of the images, by default those of the model's configuration.
        replace: overwrite what is there, weights beside it included.

    Returns:
        The file. Its input is `pixel_values (batch, channels, height, width)`, its outputs have the names that they
        have in PyTorch.

    Raises:
        BadCheckpoint: the file exists, or cannot be written; nothing is changed.
        Harmful: ONNX Runtime computes something else than PyTorch; the file is not written.
        UnsupportedModel: the model cannot be traced.
        TestregError: onnx, onnxscript or onnxruntime is not installed.
    """
    target = Path(file).expanduser().resolve()
    if target.suffix != ".onnx" or target.is_dir():
        raise BadCheckpoint(f"{file} is no name of an ONNX file: give one that ends in .onnx.")
    data = target.with_name(f"{target.name}.data")
    for taken in (target, data):
        if taken.exists() and not replace:
            raise BadCheckpoint(f"{taken} exists: choose another name, or pass replace=True (--replace).")
    if dtype not in TOLERANCE:
        raise TestregError(f"dtype is {dtype}; ONNX export is for torch.float32 and torch.float16 (--dtype float32).")
    _needs("onnx", "onnxscript", "onnxruntime")
    loaded: Any = model if isinstance(model, nn.Module) else load(model)
    plain = _Plain(copy.deepcopy(_of_images(loaded)), dtype).eval()
    example = torch.randn(2, *_shape(plain.inner, size), generator=torch.Generator().manual_seed(0)).to(dtype)
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
                f"{type(loaded).__name__} cannot be exported to ONNX: {str(error).strip().splitlines()[0]}"
            ) from error
    assert program is not None
    foreign = {node.domain for node in program.model.graph.all_nodes()} - {"", "ai.onnx"}
    if foreign:
        raise UnsupportedModel(f"{type(loaded).__name__} needs operators that ONNX has not: {', '.join(foreign)}.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            built = Path(folder) / target.name
            weights = sum(weight.numel() * weight.element_size() for weight in plain.state_dict().values())
            program.save(built, external_data=weights > WHOLE)
            _compare(plain, built, names, example, dtype)
            files = sorted(Path(folder).iterdir(), reverse=True)  # the weights before the file that names them
            if files != [built]:
                target.unlink(missing_ok=True)  # or, killed in between, it would lie beside the weights of another
            for path in files:
                os.replace(path, target.parent / path.name)
            if files == [built]:
                data.unlink(missing_ok=True)  # the weights of the file that is no more
    except OSError as error:
        raise BadCheckpoint(f"{file} could not be written: {error}.") from error
    return target


class _Plain(nn.Module):
    """Images in, a tuple of tensors out."""

    def __init__(self, model: Any, dtype: torch.dtype):
        super().__init__()
        self.inner: Any = model.to("cpu", dtype)

    def still(self) -> AbstractContextManager[None]:
        try:
            return still(self, find_tower(self.inner))
        except UnsupportedModel:  # of no known family, so nothing is known of what it draws
            return still(self)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named(pixel_values).values())

    def named(self, pixel_values: Tensor) -> dict[str, Tensor]:
        output = self.inner(pixel_values)
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


def _of_images(model: nn.Module) -> Any:
    """The model, or its vision tower where it reads text as well."""
    if getattr(model, "main_input_name", "pixel_values") == "pixel_values":
        return model
    return find_tower(model).module


def _shape(model: Any, size: tuple[int, int] | None) -> tuple[int, int, int]:
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


def _compare(plain: _Plain, file: Path, names: list[str], example: Tensor, dtype: torch.dtype) -> None:
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    for batch in BATCHES:
        images = torch.randn(batch, *example.shape[1:], generator=torch.Generator().manual_seed(batch)).to(dtype)
        with plain.still():
            expected = plain.named(images)
        got = session.run(names, {"pixel_values": images.numpy()})
        for name, value in zip(names, got, strict=True):
            wanted = expected[name].float()
            wrong = torch.from_numpy(value).float() - wanted
            error = wrong.abs().max() / wanted.abs().max().clamp(min=1)
            if dtype == torch.float16:
                error = wrong.norm() / wanted.norm()
            if not error <= TOLERANCE[dtype]:
                raise Harmful(
                    f"in ONNX Runtime {name} differs from PyTorch by {float(error):.1e} at batch size {batch}; "
                    f"at most {TOLERANCE[dtype]:.0e} is allowed. Nothing was written."
                )


def _needs(*packages: str) -> None:
    missing = []
    for package in packages:
        try:
            __import__(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise TestregError(f"ONNX export needs {', '.join(missing)}: pip install {' '.join(missing)}.")
