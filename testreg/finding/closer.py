"""A few images looked at closely, each in one pass: where attention goes, what it reads, and what outliers are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..metrics.sinks import received
from ..runtime.errors import UnsupportedModel
from ..runtime.towers import Tower
from .detect import Artefact
from .observe import observe, run
from .scan import Kept

FEW = 4  # images whose attention maps are looked at
LEAST, MOST = 4, 8  # images with outliers whose states and values are looked at,
ENOUGH = 16  # as many in between as show so many outliers


@dataclass(frozen=True)
class Glance:
    """What a model does with one image, on the CPU.

    Attributes:
        outliers: which of its patches are some, `(patches,)`.
        attention: what every token receives from the mean query, `(blocks, heads, tokens)`; None where it was not
            looked at, or the model's attention gives no maps.
        state: its patches after the block that shows outliers best, `(patches, channels)`; None where it was not
            looked at.
        values: norms of what attention reads at its patches, `(blocks, patches)`, for the blocks behind the one at
            whose output outliers appear; no block where it was not looked at, or values cannot be read.
    """

    outliers: Tensor
    attention: Tensor | None
    state: Tensor | None
    values: Tensor


def glances(model: nn.Module, tower: Tower, images: list[Kept], found: Artefact | None) -> list[Glance]:
    """The first few of `images`, and as many with outliers as tell what outliers are; the model runs as it is."""
    outliers = [
        torch.zeros(image.norms.shape[-1], dtype=torch.bool)
        if found is None
        else found.threshold.outliers(image.norms[found.shown])
        for image in images
    ]
    spoilt = _enough(outliers)
    eyes = _Eyes(model, tower, found)
    return [
        eyes.glance(image, row, maps=index < FEW, closer=index in spoilt)
        for index, (image, row) in enumerate(zip(images, outliers, strict=True))
        if index < FEW or index in spoilt
    ]


def _enough(outliers: list[Tensor]) -> set[int]:
    """Which images have outliers, as many of them as are looked at."""
    chosen: set[int] = set()
    seen = 0
    for index, row in enumerate(outliers):
        if row.any() and len(chosen) < MOST and (len(chosen) < LEAST or seen < ENOUGH):
            chosen.add(index)
            seen += int(row.sum())
    return chosen


class _Received(dict[int, Tensor]):
    """Attention maps, of which only what every token receives is kept `(images, heads, tokens)`."""

    def __setitem__(self, block: int, maps: Tensor) -> None:
        super().__setitem__(block, received(maps).cpu())


class _Eyes:
    """Look at images, and learn by the first one what cannot be seen in this model."""

    def __init__(self, model: nn.Module, tower: Tower, found: Artefact | None):
        self.model, self.tower, self.found = model, tower, found
        self.able = [(True, True), (True, False), (False, True), (False, False)]  # to see maps, to see values

    def glance(self, image: Kept, outliers: Tensor, *, maps: bool, closer: bool) -> Glance:
        """One pass, for attention maps, and closer for states and values."""
        asked = self._asked(maps, closer)
        if not (asked[0] or closer):
            return Glance(outliers, None, None, torch.empty(0, len(outliers)))
        count, prefix = len(self.tower.blocks), self.tower.prefix
        shown, behind = (-1, count) if self.found is None else (self.found.shown, self.found.block + 1)
        blocks = range(count if asked[0] else 0)
        try:
            with observe(
                self.model,
                attentions=blocks,
                states=[shown] if closer else [],
                values=range(behind, count) if asked[1] else [],
            ) as seen:
                seen.attentions = _Received()
                run(self.model, image.inputs)
            if any(len(seen.attentions[block]) != 1 for block in blocks):
                raise UnsupportedModel("attention by windows gives no map of the whole image.")
        except UnsupportedModel:
            while self.able and self._asked(maps, closer) == asked:
                del self.able[0]
            if not self.able:
                raise
            return self.glance(image, outliers, maps=maps, closer=closer)
        norms = [values[0, prefix:].float().norm(dim=-1).cpu() for values in seen.values.values()]  # each (patches,)
        return Glance(
            outliers,
            torch.stack([seen.attentions[block][0] for block in blocks]) if blocks else None,
            seen.states[shown][0, prefix:].float().cpu() if closer else None,
            torch.stack(norms) if norms else torch.empty(0, len(outliers)),
        )

    def _asked(self, maps: bool, closer: bool) -> tuple[bool, bool]:
        """Whether a look at maps, or closer, asks for maps and for values, as far as they can be seen."""
        seen_maps, seen_values = self.able[0]
        return maps and seen_maps, closer and seen_values
