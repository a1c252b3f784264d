"""Photos to calibrate on and others to compare on, read again whenever they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..images.processors import chosen
from ..images.sources import Source
from ..images.streaming import stream
from ..images.takes import taken_by
from ..runtime.errors import BadImages

FEWEST = 8  # to calibrate on, and as many to compare on
HELD_OUT = 3  # every third photo is


@dataclass(frozen=True)
class Part:
    """Two thirds of some images, or the third that is held out, one by one."""

    images: Any
    held: bool

    def __iter__(self) -> Iterator[Any]:
        for index, item in enumerate(Source(self.images)):
            if (index % HELD_OUT == HELD_OUT - 1) == self.held:
                yield item.value


class Photos:
    """Batches of a model's own inputs.

    Args:
        images: as `testreg.images.stream` takes them, which can be gone through several times.
        model: whose processor is taken, if none is given.
        held_out: what to compare on; then all `images` are to calibrate on.

    Attributes:
        seen: the images to calibrate on, for whatever reads images.
        example: two of them `(2, channels, height, width)`.
        counts: how many there are to calibrate on, and to compare on.

    Raises:
        BadImages: there are too few, or they come in several sizes.
    """

    def __init__(self, images: Any, model: nn.Module, *, processor: Any = None, held_out: Any = None, batch_size: int):
        self.processor: Any = None
        try:
            self.processor = chosen(processor, model, taken_by(model))
        except BadImages:
            if processor is not None:
                raise  # else: tensors need none, and photos say that they need one
        self.model, self.batch_size = model, batch_size
        self.seen = Part(images, held=False) if held_out is None else images
        self.apart = Part(images, held=True) if held_out is None else held_out
        if held_out is None and sum(1 for _ in Source(images)) < HELD_OUT:
            raise BadImages(f"int8 needs at least {2 * FEWEST} images, {FEWEST} of them held out; some 96 are better.")
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
        self.counts = counts
        self.example = first[:2] if len(first) > 1 else first.repeat(2, 1, 1, 1)

    def calibration(self) -> Iterator[Tensor]:
        """`pixel_values (images, channels, height, width)`."""
        return self._of(self.seen)

    def held_out(self) -> Iterator[Tensor]:
        """`pixel_values (images, channels, height, width)` of the others."""
        return self._of(self.apart)

    def _of(self, images: Any) -> Iterator[Tensor]:
        for batch in stream(images, self.processor, model=self.model, batch_size=self.batch_size):
            yield batch.inputs["pixel_values"].float()
