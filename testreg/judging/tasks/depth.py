"""A task on photos with depth maps: a linear probe on patch features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ... import metrics
from ...images import labels
from ...images.labels import Sample
from ...runtime.errors import BadImages
from ..arms import Arm
from .base import Measure, Measures, Task
from .segmentation import features_of


@dataclass
class Depth(Task):
    """Linear depth on the last block's patch features: fitted on every second photo, judged on the others.

    Attributes:
        seeds: how many probes are fitted; the mean counts, and the spread is reported.
        steps: of each probe's fit.
        block: whose output; may count from the end.
        bins: evenly spaced depths that the probe weighs (see `testreg.metrics.depth_probe`).
    """

    name: ClassVar[str] = "depth"
    side: int | None = 320
    seeds: int = 3
    steps: int = 200
    block: int = -1
    bins: int = 256

    def samples(self, data: str | Path) -> list[Sample]:
        return labels.deep(data)

    def look(self, arm: Arm, samples: Iterable[Sample]) -> np.ndarray:
        """Errors of photos that nothing was fitted on, in metres `(images, seeds)`."""
        features, depths = [], []
        for sample in samples:
            features.append(features_of(arm, sample, self.side, self.block))
            depths.append(sample.read_depth())
        if len(depths) < 2:
            raise BadImages("a probe for depth needs photos to be fitted on and others to be judged on: two or more.")
        grid = features[0].shape[-2:]
        fitted = torch.stack([interpolate(true[None, None], grid, mode="nearest-exact")[0, 0] for true in depths[::2]])
        if not bool((fitted > 0).any()):
            raise BadImages("in the photos to fit a probe on, no depth is known where the patches are: give others.")
        errors = []
        for seed in range(self.seeds):
            probe = metrics.depth_probe(torch.stack(features[::2]), fitted, bins=self.bins, seed=seed, steps=self.steps)
            judged = zip(features[1::2], depths[1::2], strict=False)  # of an odd number, one more was fitted on
            errors.append([self._error(probe, found, true) for found, true in judged])
        return np.array(errors).T

    @torch.no_grad()
    def _error(self, probe: torch.nn.Module, features: Tensor, true: Tensor) -> float:
        found = interpolate(probe(features[None]), true.shape, mode="bilinear", align_corners=False)[0, 0]
        return metrics.rmse(found, true)

    def measure(self, seen: np.ndarray, unpatched: object) -> Measures:
        spread = np.std(seen.mean(axis=0))
        setting = f"side {self.side}, block {self.block}, {self.seeds} seeds, spread {spread:.3f}"
        return {"RMSE": Measure(seen.mean(axis=1), unit="m", setting=setting)}

    def floor(self, samples: list[Sample], unpatched: object) -> Measures:
        depths = [sample.read_depth() for sample in samples]
        mean = torch.cat([true[true > 0] for true in depths[::2]]).mean()
        errors = [metrics.rmse(mean.expand(true.shape), true) for true in depths[1::2]]
        return {"mean depth everywhere, RMSE": Measure(np.array(errors), unit="m", kind="floor")}
