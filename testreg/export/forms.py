"""`export`: one way into every form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from ..checkpoints.original import is_patched, load_base
from ..runtime.decoders import towers_of
from ..runtime.errors import TestregError
from ..runtime.installer import patch
from ..runtime.modeling_testreg import load
from ..runtime.plan import RegisterPlan
from .bake import Baked, export_stock
from .checking import Check
from .int8 import export_int8
from .language import Stock, export_language, speaking
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
@overload
def export(
    model: nn.Module | str | Path,
    out: str | Path,
    *,
    format: Literal["stock"],
    plan: RegisterPlan | str | Path | None = None,
    force: bool = False,
    replace: bool = False,
) -> Stock: ...
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
) -> Path | Check | Baked | Stock:
    """Write `model` in a form that needs no testreg where it is used; it is not changed.

        testreg.export(model, "vit.onnx")
        testreg.export(model, "vit-int8.onnx", images="photos/", int8=True)
        testreg.export(model, "vit-stock", images="photos/", format="stock")
        testreg.export(model, "lm-stock", format="stock")

    Args:
        model: patched, or not; or the directory or hub name of a checkpoint.
        out: `NAME.onnx`, or, of stock weights, a directory.
        format: "onnx", or "stock" for weights alone in an architecture that has register slots; of a causal language
            model, weights of its own class and a prefix for PEFT.
        int8: ONNX in 8 bits: True, or an `Int8` with settings. Registers are found on the way, if the model has none.
        images: photos that int8 is calibrated on, or that stock weights of a Vision Transformer are fitted to, and
            that both are checked with.
        plan: registers for a model that has none.
        replace: overwrite what is there.
        more: what `export_onnx`, `export_int8`, `export_stock` or `export_language` takes besides.

    Returns:
        Of ONNX the file, of int8 what the comparison with float found, of stock weights what was written.

    Raises:
        TestregError: what the function of that form raises; or arguments that do not go together.
    """
    if format not in ("onnx", "stock"):
        raise TestregError(f"format is {format!r}: choose 'onnx' or 'stock'.")
    if format == "stock" and int8:
        raise TestregError("int8 is a form of ONNX: leave format out.")
    if int8 and images is None:
        raise TestregError("int8 needs images: photos to calibrate on and to check with.")
    if format == "onnx" and not int8 and images is not None:
        raise TestregError("the format onnx takes no images.")
    with _registers(model, plan) as loaded:
        reads = getattr(loaded, "main_input_name", "") == "input_ids"
        language = speaking(loaded) if format == "stock" or reads else None
        if language and format == "onnx":
            raise TestregError("a language model is exported as stock files: format='stock' (--format stock).")
        writer: Callable[..., Any] = export_int8 if int8 else export_onnx
        if format == "stock":
            writer = export_language if language else export_stock
        if unknown := more.keys() - signature(writer).parameters.keys():
            kind = "int8" if int8 else f"the format {format}{' of a language model' if language else ''}"
            raise TestregError(f"{kind} does not take {', '.join(sorted(unknown))}.")
        if language and images is not None:
            raise TestregError("the format stock of a language model takes no images.")
        if language:
            return export_language(loaded, language, out, replace=replace, **more)
        if format == "stock" and images is None:
            raise TestregError("the format stock needs images: photos to fit the weights to and to check with.")
        if format == "stock":
            return export_stock(loaded, images, out, replace=replace, **more)
        if int8:
            how = int8 if isinstance(int8, Int8) else None
            return export_int8(loaded, images, out, how=how, replace=replace, **more)
        dtype = more.pop("dtype", next((w.dtype for w in loaded.parameters()), torch.float32))
        return export_onnx(loaded, out, replace=replace, dtype=dtype, **more)


@contextmanager
def _registers(model: nn.Module | str | Path, plan: RegisterPlan | str | Path | None) -> Iterator[Any]:
    """The model, loaded where it is a name, with the registers of `plan` on inside the `with`."""
    loaded: Any = model
    if not isinstance(model, nn.Module):
        loaded = load(model) if is_patched(str(model)) else load_base(model, check=towers_of)
    with nullcontext() if plan is None else patch(loaded, plan):
        yield loaded
