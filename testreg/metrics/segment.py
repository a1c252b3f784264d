"""Foreground from attention, and how well a mask fits: zero-shot segmentation after arXiv 2012.09838, section 4."""

from __future__ import annotations

import torch
from torch import Tensor


def foreground(attention: Tensor, height: int, width: int) -> Tensor:
    """Attention on patches `(rows, columns)` -> how much each pixel is foreground `(height, width)`, in 0..1."""
    pixels = torch.nn.functional.interpolate(
        attention.float()[None, None], (height, width), mode="bilinear", align_corners=False
    )[0, 0]
    low, high = pixels.amin(), pixels.amax()
    return (pixels - low) / (high - low).clamp(min=torch.finfo(pixels.dtype).tiny)


def split(scores: Tensor) -> Tensor:
    """Which pixels are foreground: those above the mean, as the published protocol has it."""
    return scores > scores.mean()


def intersections(predicted: Tensor, true: Tensor, classes: int, ignore: int = 255) -> Tensor:
    """Per class `(classes, 3)`: pixels in both, predicted, and true; pixels whose true class is `ignore` left out."""
    keep = true != ignore
    predicted, true = predicted[keep].long(), true[keep].long()
    both = torch.bincount(true[predicted == true], minlength=classes)
    return torch.stack(
        [both, torch.bincount(predicted, minlength=classes), torch.bincount(true, minlength=classes)], dim=-1
    )


def mean_iou(counts: Tensor) -> Tensor:
    """Mean over the classes that occur of intersection over union, 0..1: `(..., classes, 3)` -> `(...)`.

    Args:
        counts: `intersections` summed over images.
    """
    both, predicted, true = counts.double().unbind(-1)
    return (both / (predicted + true - both)).nanmean(dim=-1)  # a class that does not occur is 0 / 0


def pixel_accuracy(counts: Tensor) -> Tensor:
    """Share of right pixels, 0..1: `intersections` summed over images `(..., classes, 3)` -> `(...)`."""
    return counts[..., 0].sum(dim=-1).double() / counts[..., 2].sum(dim=-1)


def pixel_ap(scores: Tensor, true: Tensor, ignore: int = 255) -> float:
    """Average precision of foreground `scores` against a mask of 0 and 1, pixel by pixel; `ignore` left out."""
    from sklearn.metrics import average_precision_score  # of the extra "evaluate"

    keep = true != ignore
    return float(average_precision_score(true[keep].numpy(), scores[keep].numpy()))
