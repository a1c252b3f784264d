"""Norms of patch tokens per block (arXiv 2506.08010, section 3; arXiv 2309.16588, section 2), and their repair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockNorms:
    """Patch norms at one block's output, before any final norm, in the units of the residual stream.

    Attributes:
        median, p99, largest: over all patches of all images.
        share: of patches above the threshold, 0..1.
        images: share of images with at least one such patch, 0..1.
    """

    median: float
    p99: float
    largest: float
    share: float
    images: float


def block_norms(norms: Tensor, threshold: float) -> list[BlockNorms]:
    """Statistics of norms `(images, blocks, patches)`, one row per block."""
    rows = []
    for block in norms.float().unbind(1):  # (images, patches)
        values, above = block.flatten().sort().values, block > threshold
        rows.append(
            BlockNorms(
                median=float(block.median()),
                p99=float(values[min(len(values) - 1, int(0.99 * len(values)))]),  # torch.quantile has a size limit
                largest=float(values[-1]),
                share=float(above.float().mean()),
                images=float(above.any(dim=1).float().mean()),
            )
        )
    return rows


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
