"""Linear probes on frozen patch features, batch norm and a 1 × 1 convolution: for segmentation, and for depth."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, mse_loss


def linear_probe(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    seed: int = 0,
    steps: int = 200,
    batch_size: int = 16,
    rate: float = 1e-2,
    ignore: int = 255,
) -> nn.Module:
    """A probe fitted to features `(images, channels, rows, columns)` and label maps `(images, height, width)`.

    Returns:
        A module from features to logits `(images, classes, rows, columns)`, in evaluation mode; `seed` decides how it
        starts and the order of the images. Upsample the logits bilinearly to compare with a mask.
    """
    labels = labels.long()

    def loss(logits: Tensor, picked: Tensor) -> Tensor:
        logits = interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
        return cross_entropy(logits, labels[picked], ignore_index=ignore)

    return _fitted(features, classes, nn.Identity(), loss, seed, steps, batch_size, rate)


def depth_probe(
    features: Tensor,
    depths: Tensor,
    *,
    bins: int = 256,
    seed: int = 0,
    steps: int = 200,
    batch_size: int = 16,
    rate: float = 1e-2,
) -> nn.Module:
    """A probe fitted to features `(images, channels, rows, columns)` and depths `(images, height, width)` in metres, 0
    where unknown, by the squared error: the mean of evenly spaced depths, from the least to the largest known one, each
    weighed by what a linear layer and a softmax give it (after arXiv 2011.14141, bins that do not move).

    Returns:
        A module from features to metres `(images, 1, rows, columns)`, in evaluation mode; `seed` as in `linear_probe`.
    """
    known = depths > 0
    low, high = depths[known].min(), depths[known].max()

    def loss(found: Tensor, picked: Tensor) -> Tensor:
        found = interpolate(found, depths.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        return mse_loss(found[known[picked]], depths[picked][known[picked]])

    return _fitted(
        features, bins, _Mean(torch.linspace(0, 1, bins) * (high - low) + low), loss, seed, steps, batch_size, rate
    )


class _Mean(nn.Module):
    """Logits of bins `(images, bins, rows, columns)` -> the mean of the bins' values `(images, 1, rows, columns)`."""

    values: Tensor

    def __init__(self, values: Tensor):
        super().__init__()
        self.register_buffer("values", values)

    def forward(self, logits: Tensor) -> Tensor:
        return (logits.softmax(dim=1) * self.values[:, None, None]).sum(dim=1, keepdim=True)


def _fitted(
    features: Tensor,
    outputs: int,
    reading: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    seed: int,
    steps: int,
    batch_size: int,
    rate: float,
) -> nn.Module:
    """Norm, convolution and `reading`, fitted by `loss` of what they give and of which images they were given."""
    generator = torch.Generator().manual_seed(seed)
    convolution = nn.Conv2d(features.shape[1], outputs, 1)
    probe = nn.Sequential(nn.BatchNorm2d(features.shape[1]), convolution, reading)
    for parameter in convolution.parameters():
        nn.init.normal_(parameter, std=0.01, generator=generator)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            picked = torch.randint(len(features), (batch_size,), generator=generator)
            error = loss(probe(features[picked]), picked)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            schedule.step()
    return probe.eval()
