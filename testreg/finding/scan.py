"""What images do inside a tower: patch norms of every block as sums that add up, and a few images to look at closely.

Memory does not grow with the number of images: norms go into histograms, and of the images themselves only a sample
is kept, on the disk: those with the lowest digests, which depends neither on their order nor on the batches' size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..images.streaming import Batch
from ..runtime.errors import TestregError
from ..runtime.towers import Tower
from .answers import answer, direction
from .observe import run
from .ondisk import OnDisk

PER_OCTAVE = 32  # histogram bins per factor of two: quantiles are good to 2 %
LOWEST = -24  # log2 of the lowest bin
BINS = 48 * PER_OCTAVE
TRIED = 16  # images to rank neurons on, and as many to try plans on
GUARD = 256  # and those that the guard looks at, at most
SAMPLE = 2 * TRIED + GUARD  # images that are kept
PADDING = ("pixel_attention_mask", "patch_attention_mask", "patch_valid")  # inputs that say which patches are none
PATCHES = 256  # patches of a kept image whose features are compared before and after
FEATURES = "last.features"  # a name that no input of a model can have


class Histogram:
    """Counts of positive values on a logarithmic scale, one row per block."""

    def __init__(self, blocks: int):
        self.counts = torch.zeros(blocks, BINS, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Count values `(images, blocks, any number)`."""
        bins = ((values.log2() - LOWEST) * PER_OCTAVE).clamp(0, BINS - 1).long()
        rows = torch.arange(len(self.counts), device=values.device)[:, None] * BINS
        self.counts += torch.bincount((bins + rows).flatten(), minlength=self.counts.numel()).view_as(self.counts).cpu()

    def __add__(self, other: Histogram) -> Histogram:
        total = Histogram(len(self.counts))
        total.counts = self.counts + other.counts
        return total

    def quantile(self, share: float) -> Tensor:
        """The value below which `share` of a block's values lie, `(blocks,)`."""
        below = self.counts.cumsum(1)
        wanted = (share * below[:, -1:]).clamp(min=1)
        return value((below < wanted).sum(1) + 0.5)

    def above(self, threshold: float) -> Tensor:
        """The share of a block's values in bins above `threshold`, `(blocks,)`."""
        first = bin_of(threshold)
        return self.counts[:, first:].sum(1) / self.counts.sum(1).clamp(min=1)


def bin_of(number: float) -> int:
    """The bin that begins nearest to `number`."""
    return round((math.log2(number) - LOWEST) * PER_OCTAVE)


def value(bins: Tensor) -> Tensor:
    """The values at positions on the histogram's scale; bin `i` reaches from `i` to `i + 1`."""
    return torch.exp2(bins / PER_OCTAVE + LOWEST)


class Norms:
    """Norms of patch tokens at the output of every block; those of two sets of images add up, exactly.

    Attributes:
        norms: of all patches, in the units of the residual stream.
        ratios: each norm over the median norm of its image and block.
        peaks, highest: the largest ratio, and the largest norm, of each image.
        largest: the largest norm, `(blocks,)`.
        images: how many there were.
    """

    def __init__(self, blocks: int):
        self.norms, self.ratios, self.peaks, self.highest = (Histogram(blocks) for _ in range(4))
        self.largest = torch.zeros(blocks)
        self.images = 0

    def add(self, norms: Tensor) -> None:
        """Count the norms `(images, blocks, patches)` of a batch."""
        ratios = relative(norms)
        self.norms.add(norms)
        self.ratios.add(ratios)
        self.peaks.add(ratios.amax(-1, keepdim=True))
        self.highest.add(norms.amax(-1, keepdim=True))
        self.largest = torch.maximum(self.largest, norms.amax((0, 2)).cpu())
        self.images += len(norms)

    def __add__(self, other: Norms) -> Norms:
        total = Norms(0)
        total.norms, total.ratios = self.norms + other.norms, self.ratios + other.ratios
        total.peaks, total.highest = self.peaks + other.peaks, self.highest + other.highest
        total.largest = torch.maximum(self.largest, other.largest)
        total.images = self.images + other.images
        return total


def relative(norms: Tensor) -> Tensor:
    """Norms `(..., patches)` over their median."""
    return norms / norms.median(dim=-1, keepdim=True).values.clamp(min=torch.finfo(norms.dtype).tiny)


@dataclass(frozen=True)
class Kept:
    """One image of the sample, and what the unpatched model makes of it, on the CPU.

    Attributes:
        norms: of its patches `(blocks, patches)`.
        output: logits or pooled output `(channels,)`.
        large: what lies on the disk, inputs and features.
    """

    digest: str
    norms: Tensor
    output: Tensor
    large: Mapping[str, Tensor]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Of the model, each with an axis of one image; read now."""
        return {name: self.large[name] for name in self.large if name != FEATURES}

    @property
    def features(self) -> Tensor:
        """Residual stream of some of its patches after the last block `(some patches, channels)`; read now."""
        return self.large[FEATURES]


class Sample:
    """The images with the lowest digests of all that were offered, each once; two samples add up to that of all."""

    def __init__(self, size: int = SAMPLE):
        self.size = size
        self._kept: dict[str, Kept] = {}

    def add(self, digest: str, make: Callable[[], Kept]) -> None:
        if digest in self._kept or (len(self._kept) == self.size and digest > max(self._kept)):
            return
        self._kept[digest] = make()
        if len(self._kept) > self.size:
            del self._kept[max(self._kept)]

    def __add__(self, other: Sample) -> Sample:
        total = Sample(self.size)
        for image in (*self, *other):
            total.add(image.digest, partial(_put, image))
        return total

    def __iter__(self) -> Iterator[Kept]:
        return iter([self._kept[digest] for digest in sorted(self._kept)])

    def __len__(self) -> int:
        return len(self._kept)


def scan(model: nn.Module, tower: Tower, batches: Iterable[Batch], size: int = SAMPLE) -> tuple[Norms, Sample]:
    """Run `model` as it is over `batches`, once.

    Raises:
        TestregError: a block gives NaN or infinity.
    """
    norms, sample = Norms(len(tower.blocks)), Sample(size)
    for batch in batches:
        seen = look(model, tower, batch.inputs)
        norms.add(seen.norms)
        for index, digest in enumerate(batch.digests):
            sample.add(digest, partial(_keep, digest, batch, index, seen))
        del batch, seen  # or they would wait in memory for the next ones
    return norms, sample


@dataclass(frozen=True)
class Look:
    """One forward pass: norms `(images, blocks, patches)`, output `(images, channels)`, features as in `Kept`."""

    norms: Tensor
    output: Tensor
    features: Tensor


def look(model: nn.Module, tower: Tower, inputs: Mapping[str, Tensor]) -> Look:
    """Patch norms, output and last features of one batch."""
    norms: list[Tensor] = []
    last: list[Tensor] = []

    def read(index: int, tokens: Tensor) -> None:
        norms.append(patch_norms(tokens, tower))
        if index == len(tower.blocks) - 1:
            last.append(tokens)

    with outputs(tower, read):
        output = run(model, inputs, whole=True)
    stacked = torch.stack([row.to(norms[-1].device) for row in norms], dim=1)  # (images, blocks, patches)
    broken = ~stacked.isfinite().all(-1).all(0)
    if broken.any():
        raise TestregError(
            f"block {int(broken.nonzero()[0])} gives NaN or infinity: the weights are broken, or {last[0].dtype} is "
            f"too narrow for this model; load it with dtype=torch.float32."
        )
    tokens = last[0]
    if tower.row.packed:
        said = direction(output, tokens)
    else:
        _, said = answer(output, lambda: tokens[:, 0] if tower.prefix else tokens.mean(1))
    return Look(_unpadded(stacked, inputs), said, _some(tokens[:, tower.prefix :]))


def patch_norms(tokens: Tensor, tower: Tower) -> Tensor:
    """L2 norms `(images, patches)` of the patches among tokens `(images, tokens, channels)`, in float32."""
    return torch.linalg.vector_norm(tokens[:, tower.prefix :], dim=-1, dtype=torch.float32)


@contextmanager
def outputs(tower: Tower, read: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Inside the `with`, `read(index, tokens)` gets every block's output `(images, tokens, channels)`."""

    def hook(index: int) -> Any:
        return lambda module, args, output: read(index, tower.batched(output))

    handles = [block.register_forward_hook(hook(index)) for index, block in enumerate(tower.blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def together(kept: Iterable[Kept], batch_size: int) -> Iterator[list[Kept]]:
    """Kept images in batches of one shape, in the order of their digests."""
    groups: dict[Any, list[Kept]] = {}
    for image in kept:
        shape = tuple((key, tensor.shape) for key, tensor in image.inputs.items())
        groups.setdefault(shape, []).append(image)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def stack(kept: list[Kept]) -> dict[str, Tensor]:
    """Model inputs of several kept images."""
    return {key: torch.cat([image.inputs[key] for image in kept]) for key in kept[0].inputs}


def _unpadded(norms: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Norms `(images, blocks, patches)` in which padding, if any, has the median of its image, so is no outlier."""
    for name in PADDING:
        if name in inputs and inputs[name].flatten(1).shape[1] == norms.shape[-1]:
            real = inputs[name].flatten(1).bool().to(norms.device)[:, None]  # (images, 1, patches)
            return norms.where(real, norms.masked_fill(~real, torch.nan).nanmedian(-1, keepdim=True).values)
    return norms


def _keep(digest: str, batch: Batch, index: int, seen: Look) -> Kept:
    inputs = {key: tensor[index : index + 1] for key, tensor in batch.inputs.items()}
    large = OnDisk({**inputs, FEATURES: seen.features[index].cpu()})
    # Clones, or a view of one image would hold its whole batch.
    return Kept(digest, seen.norms[index].cpu().clone(), seen.output[index].cpu().clone(), large)


def _put(image: Kept) -> Kept:
    """The image on this process's disk; from another process it comes in memory."""
    return image if isinstance(image.large, OnDisk) else replace(image, large=OnDisk(image.large))


def _some(patches: Tensor) -> Tensor:
    step = -(-patches.shape[1] // PATCHES)
    return patches[:, ::step].float()
