"""Norms of patch tokens per block (arXiv 2506.08010, section 3; arXiv 2309.16588, section 2), and their repair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockNorms:
    """Patch norms at one block's output, before any final norm, in the units of the residual stream.

    Attributes:
        median, p99, largest: over all patches of all images.
        share: of patches that are outliers, 0..1.
        images: share of images with at least one outlier, 0..1.
    """

    median: float
    p99: float
    largest: float
    share: float
    images: float


def ratios(norms: Tensor) -> Tensor:
    """Norms `(..., patches)` of one image, or of several in front, as multiples of their image's median."""
    return norms / norms.median(dim=-1, keepdim=True).values


def block_norms(norms: Sequence[Tensor], times: float, norm: float = 0.0) -> list[BlockNorms]:
    """Statistics of the norms of several images, each `(blocks, patches)`, one row per block.

    Args:
        times: a patch is an outlier above this many times the median norm of its image at the same block,
        norm: and above this norm.
    """
    outliers = [(ratios(image) > times) & (image > norm) for image in norms]
    with_one = torch.stack([image.any(dim=1) for image in outliers]).float().mean(dim=0)  # (blocks,)
    share = torch.cat(outliers, dim=1).float().mean(dim=1)  # (blocks,)
    values = torch.cat(list(norms), dim=1).float().sort(dim=1).values  # (blocks, all patches)
    patches = values.shape[1]
    columns = (values[:, (patches - 1) // 2], values[:, min(patches - 1, int(0.99 * patches))], values[:, -1])
    return [BlockNorms(*row) for row in zip(*(column.tolist() for column in (*columns, share, with_one)), strict=True)]


def locked(outliers: Sequence[Tensor], often: float) -> tuple[float | None, tuple[int, ...]]:
    """The patches that are outliers in a share `often` of the images, and which share of all outliers is there, 0..1.

    Args:
        outliers: which patches of each image are outliers, `(patches,)`.

    Returns:
        (None, ()) where images have different numbers of patches, so that places cannot be compared.
    """
    if len({len(row) for row in outliers}) != 1:
        return None, ()
    counts = torch.stack(list(outliers)).sum(0)  # (patches,)
    there = counts >= max(1.0, often * len(outliers))
    return float(counts[there].sum() / counts.sum().clamp(min=1)), tuple(there.nonzero().flatten().tolist())


def interpolate(features: Tensor, outliers: Tensor) -> Tensor:
    """Features `(rows, columns, channels)` with outlier patches `(rows, columns)` replaced by their neighbours' mean.

    The neighbours are the up to eight patches around that are no outliers; where there is none, the mean of all others.
    The simplest repair there is, as a baseline: it needs to know the outliers, and changes nothing inside the model.
    """
    if outliers.all() or not outliers.any():
        return features
    good = (~outliers).to(features)[None]  # (1, rows, columns)
    planes = torch.cat([features.movedim(-1, 0) * good, good])  # (channels + 1, rows, columns)
    around = torch.nn.functional.avg_pool2d(planes, 3, stride=1, padding=1, divisor_override=1)  # sums of 3 by 3
    everywhere = planes.sum(dim=(1, 2), keepdim=True).expand_as(around)
    around = torch.where(around[-1:] > 0, around, everywhere)
    means = (around[:-1] / around[-1:]).movedim(0, -1)  # (rows, columns, channels)
    return torch.where(outliers[..., None], means, features)
