"""A share of the images through a model, and how shares add up to all of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add

from torch import nn
from tqdm import tqdm

from ..images.streaming import Batch, ImageStream
from ..runtime.errors import BadImages, ImagesRepeated
from ..runtime.towers import Tower
from .scan import SAMPLE, Norms, Sample, scan

MANY = 0.1  # share of the images that repeat others


@dataclass(frozen=True)
class Counted:
    """What a share of the images does in the model.

    Attributes:
        skipped: how many images were broken.
        names: the sum of all digests.
    """

    norms: Norms
    sample: Sample
    skipped: int
    names: int

    def __add__(self, other: Counted) -> Counted:
        return Counted(
            self.norms + other.norms,
            self.sample + other.sample,
            self.skipped + other.skipped,
            self.names + other.names,
        )

    @property
    def digest(self) -> str:
        """Names all images, in whatever order and shares."""
        return f"{self.names % 2**256:064x}"


def count(model: nn.Module, tower: Tower, batches: ImageStream, progress: bool, size: int = SAMPLE) -> Counted:
    """`scan`, with a progress bar."""
    names = 0

    def counting() -> Iterator[Batch]:
        nonlocal names
        with tqdm(total=batches.expected, desc="images", unit="", disable=not progress) as bar:
            for batch in batches:
                yield batch
                names += sum(int(digest, 16) for digest in batch.digests)
                bar.update(len(batch))

    norms, sample = scan(model, tower, counting(), size)
    batches.warn()
    return Counted(norms, sample, len(batches.skipped), names)


def total(parts: list[Counted], batches: ImageStream) -> Counted:
    """All shares of the images together, with a warning where many of few images are the same.

    Raises:
        BadImages: there is no image in any of them.
    """
    counted = reduce(add, parts)
    if not counted.norms.images:
        raise BadImages(batches.nothing())
    images, different = counted.norms.images, len(counted.sample)
    if different < counted.sample.size and images - different >= MANY * images:  # else the sample cannot tell
        message = f"only {different} of {images} images are different; each is counted as often as it comes"
        warnings.warn(message, ImagesRepeated, stacklevel=2)
    return counted
