"""`export`: one way into every form."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from ..checkpoints.original import is_patched, load_base
from ..runtime.errors import TestregError
from ..runtime.installer import patch
from ..runtime.modeling_testreg import load
from ..runtime.plan import RegisterPlan
from .bake import Baked, export_stock
from .checking import Check
from .int8 import export_int8
from .onnx import export_onnx
from .quantiser import Int8


@overload
def export(
    model: nn.Module | str | Path,
    out: str | Path,
    *,
    format: Literal["onnx"] = "onnx",
    int8: Literal[False] = False,
    plan: RegisterPlan | str | Path | None = None,
    replace: bool = False,
    **more: Any,
) -> Path: ...
@overload
def export(
    model: nn.Module | str | Path,
    out: str | Path,
    *,
    format: Literal["onnx"] = "onnx",
    int8: Literal[True] | Int8,
    images: Any,
    plan: RegisterPlan | str | Path | None = None,
    force: bool = False,
    replace: bool = False,
    **more: Any,
) -> Check: ...
@overload
def export(
    model: nn.Module | str | Path,
    out: str | Path,
    *,
    format: Literal["stock"],
    images: Any,
    plan: RegisterPlan | str | Path | None = None,
    force: bool = False,
    replace: bool = False,
    **more: Any,
) -> Baked: ...
def export(
    model: nn.Module | str | Path,
    out: str | Path,
    *,
    format: Literal["onnx", "stock"] = "onnx",
    int8: bool | Int8 = False,
    images: Any = None,
    plan: RegisterPlan | str | Path | None = None,
    replace: bool = False,
    **more: Any,
) -> Path | Check | Baked:
    """Write `model` in a form that needs no testreg where it is used; it is not changed.

        testreg.export(model, "vit.onnx")
        testreg.export(model, "vit-int8.onnx", images="photos/", int8=True)
        testreg.export(model, "vit-stock", images="photos/", format="stock")

    Args:
        model: patched, or not; or the directory or hub name of a checkpoint.
        out: `NAME.onnx`, or, of stock weights, a directory.
        format: "onnx", or "stock" for weights alone in an architecture that has register slots.
        int8: ONNX in 8 bits: True, or an `Int8` with settings. Registers are found on the way, if the model has none.
        images: photos that int8 is calibrated on, or that stock weights are fitted to, and that both are checked with.
        plan: registers for a model that has none.
        replace: overwrite what is there.
        more: what `export_onnx`, `export_int8` or `export_stock` takes besides.

    Returns:
        Of ONNX the file, of int8 what the comparison with float found, of stock weights what was written.

    Raises:
        TestregError: what the function of that form raises; or arguments that do not go together.
    """
    if format not in ("onnx", "stock"):
        raise TestregError(f"format is {format!r}: choose 'onnx' or 'stock'.")
    if (format == "stock" or int8) == (images is None):
        needs = "needs images: photos to calibrate on and to check with" if images is None else "takes no images"
        raise TestregError(f"{'int8' if int8 else f'the format {format}'} {needs}.")
    if format == "stock" and int8:
        raise TestregError("int8 is a form of ONNX: leave format out.")
    writer: Callable[..., Any] = export_stock if format == "stock" else export_int8 if int8 else export_onnx
    if unknown := more.keys() - signature(writer).parameters.keys():
        raise TestregError(f"{'int8' if int8 else f'the format {format}'} does not take {', '.join(sorted(unknown))}.")
    if format == "stock":
        return export_stock(model, images, out, plan=plan, replace=replace, **more)
    loaded: Any = model if isinstance(model, nn.Module) else _loaded(model)
    acting = None if plan is None else patch(loaded, plan)
    try:
        if not int8:
            dtype = more.pop("dtype", next((w.dtype for w in loaded.parameters()), torch.float32))
            return export_onnx(loaded, out, replace=replace, dtype=dtype, **more)
        how = int8 if isinstance(int8, Int8) else None
        return export_int8(loaded, images, out, how=how, replace=replace, **more)
    finally:
        if acting is not None:
            acting.remove()


def _loaded(model: str | Path) -> Any:
    return load(model) if is_patched(str(model)) else load_base(model)
