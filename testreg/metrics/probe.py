"""A linear segmentation probe on frozen patch features: batch norm and a 1 × 1 convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate


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
    generator = torch.Generator().manual_seed(seed)
    convolution = nn.Conv2d(features.shape[1], classes, 1)
    probe = nn.Sequential(nn.BatchNorm2d(features.shape[1]), convolution)
    for parameter in convolution.parameters():
        nn.init.normal_(parameter, std=0.01, generator=generator)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    labels = labels.long()
    with torch.enable_grad():
        for _ in range(steps):
            picked = torch.randint(len(features), (batch_size,), generator=generator)
            logits = interpolate(probe(features[picked]), labels.shape[-2:], mode="bilinear", align_corners=False)
            loss = cross_entropy(logits, labels[picked], ignore_index=ignore)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return probe.eval()
