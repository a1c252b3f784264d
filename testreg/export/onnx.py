"""ONNX export of a model with registers, patched or baked, checked in ONNX Runtime."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import BadCheckpoint, Harmful, TestregError
from ..runtime.modeling_testreg import load
from .tracing import Plain, needs, of_images, session_of, shape_of, traced

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
    target, data = free(file, replace)
    if dtype not in TOLERANCE:
        raise TestregError(f"dtype is {dtype}; ONNX export is for torch.float32 and torch.float16 (--dtype float32).")
    loaded: Any = model if isinstance(model, nn.Module) else load(model)
    plain = Plain(copy.deepcopy(of_images(loaded)), dtype).eval()
    example = torch.randn(2, *shape_of(plain.inner, size), generator=torch.Generator().manual_seed(0)).to(dtype)
    program, names = traced(plain, example)
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


def free(file: str | Path, replace: bool) -> tuple[Path, Path]:
    """Where an ONNX file is to be written, and the weights beside it, where they are too many for one file.

    Raises:
        BadCheckpoint: one of them is there, and is not to be replaced.
        TestregError: onnx, onnxscript or onnxruntime is not installed.
    """
    target = Path(file).expanduser().resolve()
    if target.suffix != ".onnx" or target.is_dir():
        raise BadCheckpoint(f"{file} is no name of an ONNX file: give one that ends in .onnx.")
    data = target.with_name(f"{target.name}.data")
    for taken in (target, data):
        if taken.exists() and not replace:
            raise BadCheckpoint(f"{taken} exists: choose another name, or pass replace=True (--replace).")
    needs("onnx", "onnxscript", "onnxruntime")
    return target, data


def _compare(plain: Plain, file: Path, names: list[str], example: Tensor, dtype: torch.dtype) -> None:
    session = session_of(file)
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
