"""Tasks that need no labels: outliers, attention sinks, agreement with the unpatched model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ... import metrics
from ...finding.observe import observe, run
from ...images.labels import Sample
from ..arms import USUAL, Arm
from ..asking import ask
from .base import Measure, Measures, Task


@dataclass
class Outliers(Task):
    """Patch norms at every block's output: means over images of each image's median, 99th percentile and largest."""

    name: ClassVar[str] = "outliers"
    repairable: ClassVar[bool] = False
    counts_outliers: ClassVar[bool] = True

    def look(self, arm: Arm, samples: Iterable[Sample]) -> list[Tensor]:
        blocks, found = range(len(arm.tower.blocks)), []
        for sample in samples:
            with observe(arm.model, states=blocks) as seen:
                run(arm.model, arm.inputs(sample.path, self.side))
            states = [seen.states[block][0, arm.tower.prefix :] for block in blocks]
            found.append(torch.stack(states).float().norm(dim=-1).cpu())  # (blocks, patches)
        return found

    def measure(self, seen: list[Tensor], unpatched: list[Tensor]) -> Measures:
        worst = int(torch.stack([norms.amax(1) / norms.median(1).values for norms in unpatched]).mean(0).argmax())
        found: Measures = {}
        if worst < len(seen[0]):
            found |= self._at(worst, seen, partial(Measure, setting=f"after block {worst}, where they stand out most"))
        for block in range(len(seen[0])):
            rows = self._at(block, seen, partial(Measure, setting=f"after block {block}", kind="block"))
            found |= {f"{name}, block {block}": measure for name, measure in rows.items()}
        return found

    def _at(self, block: int, seen: list[Tensor], row: Callable[..., Measure]) -> Measures:
        norms = [image[block] for image in seen]  # each (patches,)
        threshold = self.threshold or USUAL
        shares = np.array([float(threshold.outliers(image).float().mean()) for image in norms])
        return {
            "outlier patches": row(shares),
            "images with one": row((shares > 0).astype(float)),
            "median norm": row(np.array([float(image.median()) for image in norms]), unit=""),
            "p99 norm": row(np.array([float(image.quantile(0.99)) for image in norms]), unit=""),
            "largest norm": row(np.array([float(image.max()) for image in norms]), unit=""),
        }


@dataclass
class SinkRates(Task):
    """Attention sinks over all blocks and heads (arXiv 2410.10781)."""

    name: ClassVar[str] = "sinks"
    repairable: ClassVar[bool] = False
    epsilon: float = 0.3

    def look(self, arm: Arm, samples: Iterable[Sample]) -> list[metrics.Sinks]:
        blocks, found = range(len(arm.tower.blocks)), []
        for sample in samples:
            with observe(arm.model, attentions=blocks) as seen:
                run(arm.model, arm.inputs(sample.path, self.side))
            maps = torch.stack([seen.attentions[block] for block in blocks])  # (blocks, 1, heads, tokens, tokens)
            found.append(metrics.sinks(maps, arm.tower.prefix, epsilon=self.epsilon))
        return found

    def measure(self, seen: list[metrics.Sinks], unpatched: Any) -> Measures:
        names = {
            "sink rate of patches": "rate",
            "largest share on one patch": "largest",
            "share on prefix tokens": "class_token",
            "share on registers": "registers",
        }
        setting = f"epsilon {self.epsilon:g}"
        return {
            name: Measure(torch.cat([getattr(row, of) for row in seen]).cpu().numpy(), setting=setting)
            for name, of in names.items()
        }


@dataclass
class Agreements(Task):
    """How much of the model's own answer stays."""

    name: ClassVar[str] = "agreement"
    repairable: ClassVar[bool] = False

    def look(self, arm: Arm, samples: Iterable[Sample]) -> Tensor:
        return torch.cat([ask(arm.model, arm.inputs(sample.path, self.side))[1] for sample in samples])

    def measure(self, seen: Tensor, unpatched: Tensor) -> Measures:
        if seen.shape != unpatched.shape:
            return {}  # another model's answers lie in another space
        found = metrics.agreement(seen, unpatched)
        same = Measure(found.same.float().numpy())
        return {"cosine of the output": Measure(found.cosine.numpy(), unit=""), "same largest entry": same}
