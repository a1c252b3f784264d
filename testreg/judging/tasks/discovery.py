"""Object discovery with LOST on photos with boxes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from ... import metrics
from ...images import labels
from ...images.labels import Sample
from ..arms import Arm
from .base import Measure, Measures, Task


class Setting(NamedTuple):
    """Which features LOST sees: "keys" or "states" of a block, and its bias (see `testreg.metrics.lost`)."""

    features: str
    block: int
    bias: float | None

    def __str__(self) -> str:
        return f"{self.features} of block {self.block}, bias {'none' if self.bias is None else f'{self.bias:g}'}"


@dataclass
class Discovery(Task):
    """CorLoc: share of photos whose one box hits an object, IoU of at least 0.5 (arXiv 2109.14279).

    Attributes:
        features, block, bias: the fixed setting; `block` may count from the end.
        sweep: also try other blocks, features and biases, reported apart.
    """

    name: ClassVar[str] = "discovery"
    side: int | None = 320
    features: str = "keys"
    block: int = -1
    bias: float | None = -0.4
    sweep: bool = False

    def samples(self, data: str | Path) -> list[Sample]:
        return labels.boxed(data)

    def settings(self, blocks: int) -> list[Setting]:
        """The fixed one first, then those of the sweep."""
        found = [Setting(self.features, range(blocks)[self.block], self.bias)]
        if self.sweep:
            found += [
                Setting(features, block, bias)
                for features in ("keys", "states")
                for block in range(max(0, blocks - 4), blocks)
                for bias in (None, -0.2, -0.4, -0.6)
            ]
        return list(dict.fromkeys(found))

    def look(self, arm: Arm, samples: Iterable[Sample]) -> dict[Setting, list[bool]]:
        hits: dict[Setting, list[bool]] = {setting: [] for setting in self.settings(len(arm.tower.blocks))}
        wanted = list(dict.fromkeys((setting.features, setting.block) for setting in hits))
        for sample in samples:
            features = dict(zip(wanted, arm.features(arm.inputs(sample.path, self.side), wanted), strict=True))
            width, height = sample.size()
            for setting, row in hits.items():
                found = features[setting.features, setting.block]  # (rows, columns, channels)
                rows, columns = found.shape[:2]
                to_pixels = torch.tensor([width / columns, height / rows] * 2)
                box = torch.tensor(metrics.lost(found, bias=setting.bias)) * to_pixels
                row.append(metrics.located(box, sample.boxes))
        return hits

    def measure(self, seen: dict[Setting, list[bool]], unpatched: object) -> Measures:
        return {
            f"CorLoc, {setting}": Measure(
                np.array(row, float), setting=f"side {self.side}, {setting}", kind="sweep" if index else "fixed"
            )
            for index, (setting, row) in enumerate(seen.items())
        }

    def floor(self, samples: list[Sample], unpatched: dict[Setting, list[bool]]) -> Measures:
        hits = []
        for sample in samples:
            width, height = sample.size()
            hits.append(metrics.located(torch.tensor([0.0, 0.0, width, height]), sample.boxes))
        return {"whole-image box": Measure(np.array(hits, float), kind="floor")}
