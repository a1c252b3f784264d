"""The picture before and after: patch norms and attention of a few photos, without and with registers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..finding.observe import observe, run, unpatched
from ..finding.places import in_place
from ..images.streaming import ImageStream, pictures, stream
from ..images.takes import pixels
from ..runtime.errors import BadPlan, UnsupportedModel
from ..runtime.installer import active, patch
from ..runtime.plan import RegisterPlan
from ..runtime.towers import find_tower
from .charts import round_ticks

BLANK = torch.full((64, 64, 3), 0.5)  # where there is no photo, only what a processor made of it
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")  # how the names of pictures end
MOST = 12  # photos in one picture; more are too small to see


@dataclass(frozen=True)
class View:
    """One photo as one model sees it.

    Attributes:
        norms: L2 norm of each patch token, block by block `(blocks, rows, columns)`.
        attention: of the last block, mean over heads `(rows, columns)`: what the class token gives each patch, or,
            where there is no class token, what each patch gets from the mean patch. A share of 1.
        registers: the share of the same attention that goes to test-time registers.
    """

    norms: Tensor
    attention: Tensor
    registers: float


def views(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[View]:
    """A view of each image of a processed batch, of the model as it is now, patched or not."""
    tower = find_tower(model)
    shape = tuple(pixels(inputs).shape)
    if len(shape) != 4 and not tower.row.packed:
        raise UnsupportedModel(
            f"{type(tower.module).__name__} takes pixel values of the shape {shape}; maps can be drawn for photos "
            f"(images, channels, height, width) alone."
        )
    blocks, last = range(len(tower.blocks)), len(tower.blocks) - 1
    with observe(model, states=blocks, attentions=[last]) as seen:
        run(model, inputs)
    norms = torch.stack([seen.states[block][:, tower.prefix :].float().norm(dim=-1) for block in blocks], dim=1)
    attention = seen.attentions[last].float().mean(dim=1)  # (batch, tokens, tokens)
    attention = (attention[:, :1] if tower.prefix else attention).mean(dim=1)  # (batch, tokens)
    registers = (1 - attention.sum(dim=-1)).clamp(min=0)
    norms = in_place(norms, tower, inputs).cpu()  # (batch, blocks, rows, columns)
    attention = in_place(attention[:, tower.prefix :], tower, inputs).cpu()  # (batch, rows, columns)
    return [View(norm, share, float(taken)) for norm, share, taken in zip(norms, attention, registers, strict=True)]


def clearest_block(seen: Iterable[View]) -> int:
    """The block at whose output patches stand out most: where the largest norm is most times the median."""
    ratios = [view.norms.flatten(1).amax(1) / view.norms.flatten(1).median(1).values for view in seen]
    return int(torch.stack(ratios).mean(0).argmax())


def show(
    model: nn.Module,
    plan: RegisterPlan | str | Path | None,
    images: Any,
    *,
    processor: Any = None,
    title: str | None = None,
) -> Figure:
    """Draw each photo with its patch norms and its attention, before and after; one row per photo, at most 12.

    Args:
        model: a Vision Transformer, or a model that holds one; as it was when the picture is done.
        plan: the registers to draw, or the path of their file; None = those of the patch that acts on the model.
        images: whatever `testreg.find` takes.
        processor: the image processor; by default the one that lies with the model's checkpoint.
        title: the line on top; by default the model's name.

    Returns:
        A matplotlib figure: `.savefig("before_after.png")`.

    Raises:
        BadImages: none of the images can be read.
        BadPlan: there is no plan, neither given nor on the model; or it does not fit the model.
        UnsupportedModel: no family describes the model, or it gives no attention maps.
    """
    current = active(model)
    if plan is None:
        if current is None:
            raise BadPlan(
                "the model is not patched and no plan is given: pass plan=testreg.find(model, images) (--plan FILE on "
                "the command line)."
            )
        plan = current.plan
    plan = RegisterPlan.of(plan)
    photos: list[Tensor] = []
    before: list[View] = []
    after: list[View] = []
    packed = find_tower(model).row.packed
    source = stream(images, processor, model=model, batch_size=1 if packed else MOST)
    seen = photographs(images) if packed else {}
    for inputs, digests in first(source, MOST):
        with unpatched(model):
            before.extend(views(model, inputs))
        with patch(model, plan):
            after.extend(views(model, inputs))
        if packed:
            photos.append(seen.get(digests[0], BLANK))  # whose pixel values are patches, in an order of their own
        else:
            photos.extend(as_photo(image, source.processor) for image in pixels(inputs))
    source.warn()
    name = title or getattr(model, "name_or_path", "").rstrip("/").split("/")[-1] or type(model).__name__
    received = "class-token attention" if find_tower(model).prefix else "mean attention that each patch receives"
    return _draw(photos, before, after, title=name, subtitle=str(plan), attention=received)


def photographs(images: Any) -> dict[str, Tensor]:
    """Photos `(height, width, 3)` in 0..1 by their digests, of images that come as files or pictures."""
    return {name: torch.from_numpy(np.array(photo)) / 255 for name, photo in pictures(images, MOST)}


def first(source: ImageStream, left: int) -> Iterator[tuple[Mapping[str, Tensor], tuple[str, ...]]]:
    """Batches of inputs, and digests, of the first images alone."""
    for batch in source:
        yield {name: value[:left] for name, value in batch.inputs.items()}, batch.digests[:left]
        left -= len(batch)
        if left <= 0:
            return


def as_photo(image: Tensor, processor: Any) -> Tensor:
    """Pixel values `(channels, height, width)`, gray or RGB first, as a photo `(height, width, 3)` in 0..1."""
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    image = image[:3] if len(image) > 2 else image[:1]
    if mean is None or std is None or not getattr(processor, "do_normalize", True):
        low, high = image.amin(), image.amax()
        image = (image - low) / (high - low).clamp(min=1e-6)
    else:
        mean, std = (torch.as_tensor(values).reshape(-1)[: len(image), None, None] for values in (mean, std))
        image = image * std + mean
    return image.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0)


INK, QUIET, MAP = "#1f2328", "#59636e", "inferno"
SIDE, GAP, HEAD, FOOT, BELOW = 2.2, 0.25, 1.5, 0.75, 0.42  # inches: a map, between maps, above, below, under a map


def _draw(
    photos: list[Tensor], before: list[View], after: list[View], *, title: str, subtitle: str, attention: str
) -> Figure:
    block = clearest_block(before)
    lefts = [GAP + column * (SIDE + GAP) for column in range(5)]
    heights = [SIDE * photo.shape[0] / photo.shape[1] for photo in photos]
    tops = [HEAD + sum(heights[:row]) + row * BELOW for row in range(len(photos))]
    width, height = lefts[-1] + SIDE + GAP, tops[-1] + heights[-1] + BELOW + FOOT
    figure = Figure(figsize=(width, height), facecolor="white", dpi=150)

    def box(left: float, top: float, wide: float, high: float) -> Axes:
        position = (left / width, 1 - (top + high) / height, wide / width, high / height)
        return figure.add_axes(position, xticks=[], yticks=[], frame_on=False)

    def panel(row: int, column: int, image: Tensor, below: str = "", **style: Any) -> None:
        axes = box(lefts[column], tops[row], SIDE, heights[row])
        axes.imshow(image, aspect="auto", extent=(0, 1, 0, 1), **style)
        axes.set_xlabel(below, size=9, color=QUIET)

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, text, **{"color": INK, "ha": "center", **style})

    write(GAP, 0.4, title, size=15, weight="bold", ha="left")
    write(GAP, 0.66, subtitle, size=9, color=QUIET, ha="left")
    middles = [left + SIDE / 2 for left in lefts]
    write((middles[1] + middles[2]) / 2, 1.08, f"patch norms after block {block}", size=11, weight="bold")
    write((middles[3] + middles[4]) / 2, 1.08, attention, size=11, weight="bold")
    for middle, text in zip(middles, ("photo", "before", "after", "before", "after"), strict=True):
        write(middle, 1.4, text, size=10, color=QUIET)

    norms = [(view.norms[block], patched.norms[block]) for view, patched in zip(before, after, strict=True)]
    values = torch.cat([values.flatten() for pair in norms for values in pair]).clamp(min=1e-6)
    low, high = float(values.min()), float(values.max())
    scale = LogNorm(low, high)
    for row, photo in enumerate(photos):
        panel(row, 0, photo)
        for column, norm in enumerate(norms[row]):
            panel(row, 1 + column, norm, f"largest {norm.max():.3g}, median {norm.median():.3g}", norm=scale, cmap=MAP)
        for column, view in enumerate((before[row], after[row])):
            below = f"largest {view.attention.max():.1%}"
            if column:
                below += f", registers {view.registers:.0%}"
            panel(row, 3 + column, view.attention, below, vmin=0, cmap=MAP)

    bar = box(lefts[1], height - FOOT + 0.12, 2 * SIDE + GAP, 0.12)
    ticks = round_ticks(low, high)
    colours = figure.colorbar(ScalarMappable(scale, MAP), cax=bar, orientation="horizontal", ticks=ticks, format="%g")
    colours.outline.set_visible(False)
    colours.minorticks_off()
    bar.tick_params(labelsize=8, labelcolor=QUIET, color=QUIET)
    write(
        (middles[3] + middles[4]) / 2,
        height - FOOT + 0.24,
        "each map from 0 (black) to its own largest patch",
        size=9,
        color=QUIET,
    )
    return figure
