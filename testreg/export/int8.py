"""ONNX export in int8: a static quantiser, on a model in which nothing is an outlier any more."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..finding.observe import unpatched
from ..finding.search import find
from ..runtime.errors import BadCheckpoint, Harmful, NoOutliers, TestregError
from ..runtime.installer import active, patch
from ..runtime.modeling_testreg import load
from ..runtime.plan import RegisterPlan
from . import graph as graphs
from .checking import Check, check, guilty
from .onnx import free
from .photos import Photos
from .quantiser import Int8, quantise, watch
from .rest import put_at_rest
from .tracing import NORMS, Plain, of_images, traced

LEAST = 0.95  # of the cosine between int8 and float


def export_int8(
    model: nn.Module | str | Path,
    images: Any,
    file: str | Path,
    *,
    held_out: Any = None,
    how: Int8 | None = None,
    processor: Callable[..., Any] | str | None = None,
    batch_size: int = 8,
    force: bool = False,
    replace: bool = False,
) -> Check:
    """Write `model` as ONNX in int8, and compare it with itself in float, both without and with registers.

    The outliers that the artefact puts into a model waste an 8-bit scale. Registers that only attention sees take them
    out of every tensor: those of a patched model, or else what `testreg.find` finds on the photos to calibrate on.

    Args:
        model: patched with registers that only attention sees, or not patched; or the directory or hub name of a
            checkpoint. It is not changed. Of a model that also reads text, the vision tower is exported.
        images: photos, as `testreg.find` takes them, which can be gone through several times; a batch at a time is in
            memory. Ranges come from two thirds of them, the comparison from the others.
        file: `NAME.onnx`. Its input is `pixel_values (batch, channels, height, width)`, of any number of images.
        held_out: photos to compare on; then ranges come from all `images`.
        how: by default what is right on every processor.
        processor: by default the model's own.
        force: write it, however far it is from the float model.
        replace: overwrite what is there.

    Returns:
        What the comparison found.

    Raises:
        BadCheckpoint: the file exists, or cannot be written; nothing is changed.
        BadImages: there are too few images, or they come in several sizes.
        Harmful: int8 changes the model too much; the message has the numbers and the layers, and nothing is written.
        UnsupportedModel: the model cannot be traced.
        TestregError: the registers are tokens, which no quantiser gains by; or onnx, onnxscript or onnxruntime is not
            installed.
    """
    target, data = free(file, replace)
    how = how or Int8()
    given: Any = model if isinstance(model, nn.Module) else load(model)
    loaded = of_images(given)
    seen = Photos(images, given, processor=processor, held_out=held_out, batch_size=batch_size)
    plan, about = _registers(loaded, seen, how)
    with unpatched(loaded):
        plain = copy.deepcopy(loaded).to("cpu", torch.float32).eval()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            files = _both(plain, Path(folder), "unpatched", seen, how)
            if plan is not None:
                left = put_at_rest(plain, plan, {"pixel_values": seen.example})
                patch(plain, left)
                files |= _both(plain, Path(folder), "patched", seen, how)
            found = changed(check(files, seen.held_out()), calibrated=seen.counts[0], about=about)
            if found.sides[-1].kept < LEAST and not force:
                raise Harmful(_too_far(found, files, seen))
            os.replace(_bare(list(files.values())[-1]), target)
            data.unlink(missing_ok=True)  # the weights of the file that is no more
    except OSError as error:
        raise BadCheckpoint(f"{file} could not be written: {error}.") from error
    return found


def _registers(model: nn.Module, seen: Photos, how: Int8) -> tuple[RegisterPlan | None, str]:
    """The registers to quantise with, if any, and a sentence about them."""
    current = active(model)
    if current is not None and current.plan.form != "attention":
        raise TestregError(
            f"the registers are of the {current.plan.form} form: as tokens they carry the outlier through every "
            f"linear, so that int8 gains nothing by them. Give the unpatched model, whose registers are found on the "
            f"way, or find some that only attention sees: testreg.find(model, images, form='attention')."
        )
    if current is not None:
        return current.plan, f"Registers as they were: {current.plan}."
    try:
        plan = find(model, seen.seen, processor=seen.processor, form="attention", sizes=())
    except NoOutliers as error:
        return None, f"Nothing had to be patched: {error}"
    except Harmful as error:
        return None, f"Without registers: {error}"
    return plan, f"Registers found on the photos to calibrate on: {plan}."


def _both(model: nn.Module, folder: Path, name: str, seen: Photos, how: Int8) -> dict[str, Path]:
    """The model as it is, in float and in int8, with the norms of its patches as one more output."""
    import onnx_ir as ir

    program, _ = traced(Plain(copy.deepcopy(model), torch.float32, norms=True).eval(), seen.example)
    made = program.model
    real, even, whole = (folder / f"{name}{kind}.onnx" for kind in ("", ".even", ".int8"))
    graphs.name_linears(made.graph)
    graphs.lift_rows(made.graph)
    graphs.tidy(made)
    ir.save(made, real)
    if how.evens:
        read = [value.name for value in graphs.inputs(made.graph)]
        graphs.even_out(made.graph, watch(real, read, seen.calibration()), per_channel=not how.per_tensor)
        graphs.tidy(made)
    ir.save(made, even)
    quantise(even, whole, seen.calibration, how)
    return {f"{name}, float": real, f"{name}, int8": whole}


def _too_far(found: Check, files: dict[str, Path], seen: Photos) -> str:
    best, real = found.sides[-1], found.sides[-2]
    layers = guilty(files[real.name], files[best.name], next(seen.held_out()))
    worst = layers[0][0]
    named = ", ".join(f"{name} ({share:.0%})" for name, share in layers)
    return (
        f"int8 changes the model too much: its output has a cosine of {best.kept:.3f} with that in float, and "
        f"{LEAST} is needed; {best.same:.1%} of the largest entries stay. Of a typical token most is lost in front of "
        f"{named}. Keep layers in float, keep=({worst!r},) (--keep {worst}), or calibrate on more photos; "
        f"force=True (--force) writes it as it is. Nothing was written. {found.about}"
    )


def _bare(file: Path) -> Path:
    """The file without the output that only checks read."""
    import onnx_ir as ir

    model = ir.load(file)
    for value in [value for value in model.graph.outputs if value.name == NORMS]:
        model.graph.outputs.remove(value)
    graphs.tidy(model)
    bare = file.with_suffix(".bare.onnx")
    ir.save(model, bare)
    return bare
