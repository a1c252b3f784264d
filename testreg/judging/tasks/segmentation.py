"""Tasks on photos with masks: foreground from attention, and a linear probe on patch features."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ... import metrics
from ...images import labels
from ...images.labels import IGNORE, Sample
from ..arms import Arm
from .base import Measure, Measures, Task


@dataclass
class Attention(Task):
    """Zero-shot foreground segmentation from the class token's attention in the last block.

    Attributes:
        foreground: mask values that are foreground; None = all but 0. `IGNORE` is always left out.
    """

    name: ClassVar[str] = "attention"
    side: int | None = 320
    foreground: Collection[int] | None = None

    def samples(self, data: str | Path) -> list[Sample]:
        return labels.masked(data)

    def look(self, arm: Arm, samples: Iterable[Sample]) -> list[tuple[Tensor, float]]:
        found = []
        for sample in samples:
            true = _foreground(sample, self.foreground)
            scores = metrics.foreground(arm.attention(arm.inputs(sample.path, self.side)), *true.shape)
            found.append(
                (metrics.intersections(metrics.split(scores), true, classes=2), metrics.pixel_ap(scores, true))
            )
        return found

    def measure(self, seen: list[tuple[Tensor, float]], unpatched: object) -> Measures:
        counts = np.stack([counts.numpy() for counts, _ in seen])  # (images, 2, 3)
        row = partial(Measure, setting=f"side {self.side}, last block, threshold at the mean")
        return {
            "mIoU": row(counts, statistic=_mean_iou),
            "pixel accuracy": row(counts, statistic=_pixel_accuracy),
            "mAP": row(np.array([precision for _, precision in seen])),
        }

    def floor(self, samples: list[Sample], unpatched: object) -> Measures:
        seen = []
        for sample in samples:
            true = _foreground(sample, self.foreground)
            kept = true[true != IGNORE]
            seen.append((metrics.intersections(torch.ones_like(true), true, classes=2), float(kept.float().mean())))
        return {
            f"all foreground, {name}": Measure(measure.values, statistic=measure.statistic, kind="floor")
            for name, measure in self.measure(seen, None).items()
        }


@dataclass
class Probe(Task):
    """Linear segmentation on the last block's patch features: fitted on every second photo, judged on the others.

    Attributes:
        seeds: how many probes are fitted; the mean counts, and the spread is reported.
        steps: of each probe's fit.
        block: whose output; may count from the end.
        foreground: tell only these mask values from all others; None = every class from every other.
    """

    name: ClassVar[str] = "probe"
    side: int | None = 320
    seeds: int = 3
    steps: int = 200
    block: int = -1
    foreground: Collection[int] | None = None

    def samples(self, data: str | Path) -> list[Sample]:
        return labels.masked(data)

    def look(self, arm: Arm, samples: Iterable[Sample]) -> list[np.ndarray]:
        features, masks = [], []
        for sample in samples:
            features.append(features_of(arm, sample, self.side, self.block))
            masks.append(sample.read_mask() if self.foreground is None else _foreground(sample, self.foreground))
        names = torch.unique(torch.cat([mask.flatten() for mask in masks]))
        names = names[names != IGNORE]  # (classes,)
        index = torch.full((max(IGNORE, int(names.max())) + 1,), IGNORE).scatter(0, names, torch.arange(len(names)))
        truths = [index[mask] for mask in masks]
        fitted = torch.stack([_shrunk(true, features[0].shape[-1]) for true in truths[::2]])
        return [
            np.stack([counts.numpy() for counts in self._judge(features, fitted, truths, len(names), seed)])
            for seed in range(self.seeds)
        ]

    def _judge(
        self, features: list[Tensor], fitted: Tensor, truths: list[Tensor], classes: int, seed: int
    ) -> list[Tensor]:
        probe = metrics.linear_probe(torch.stack(features[::2]), fitted, classes, seed=seed, steps=self.steps)
        counts = []
        for found, true in zip(features[1::2], truths[1::2], strict=True):
            with torch.no_grad():
                logits = interpolate(probe(found[None]), true.shape, mode="bilinear", align_corners=False)[0]
            counts.append(metrics.intersections(logits.argmax(dim=0), true, classes))  # (classes, 3)
        return counts

    def measure(self, seen: list[np.ndarray], unpatched: object) -> Measures:
        counts = np.stack(seen, axis=1)  # (images, seeds, classes, 3)
        spread = np.std([_mean_iou(counts[:, seed]) for seed in range(self.seeds)])
        setting = f"side {self.side}, block {self.block}, {self.seeds} seeds, spread {100 * spread:.1f}"
        return {"mIoU": Measure(counts, statistic=_mean_iou_over_seeds, setting=setting)}


def features_of(arm: Arm, sample: Sample, side: int | None, block: int) -> Tensor:
    """Patch features after a block `(channels, rows, columns)` of a photo made a square of `side` pixels."""
    assert side is not None
    (found,) = arm.features(
        arm.inputs(sample.path, side, square=True), [("states", range(len(arm.tower.blocks))[block])]
    )
    return found.movedim(-1, 0)


def _foreground(sample: Sample, values: Collection[int] | None) -> Tensor:
    """The mask of `sample` with 1 on foreground, 0 on background, and `IGNORE`."""
    mask = sample.read_mask()
    wanted = mask != 0 if values is None else torch.isin(mask, torch.tensor(sorted(values)))
    return torch.where(mask == IGNORE, mask, wanted.long())


def _mean_iou(counts: np.ndarray) -> np.ndarray:
    """Counts `(..., images, classes, 3)` -> `(...)`."""
    return metrics.mean_iou(torch.from_numpy(counts).sum(dim=-3)).numpy()


def _mean_iou_over_seeds(counts: np.ndarray) -> np.ndarray:
    """Counts `(..., images, seeds, classes, 3)` -> `(...)`."""
    return metrics.mean_iou(torch.from_numpy(counts).sum(dim=-4)).mean(dim=-1).numpy()


def _pixel_accuracy(counts: np.ndarray) -> np.ndarray:
    """Counts `(..., images, classes, 3)` -> `(...)`."""
    return metrics.pixel_accuracy(torch.from_numpy(counts).sum(dim=-3)).numpy()


def _shrunk(mask: Tensor, side: int) -> Tensor:
    return interpolate(mask[None, None].float(), (side, side), mode="nearest-exact")[0, 0].long()
