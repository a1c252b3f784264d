"""Tasks that need no labels: outliers, attention sinks, agreement with the unpatched model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .. import metrics
from ..arms import Arm
from ..labels import Sample
from ..observe import observe, run
from .base import Measure, Measures, Task, answer


@dataclass
class Outliers(Task):
    """Patch norms per block. A patch is an outlier from `times` the median of the unpatched model's block on."""

    name: ClassVar[str] = "outliers"
    repairable: ClassVar[bool] = False
    times: float = 4.0

    def look(self, arm: Arm, samples: Iterable[Sample]) -> list[Tensor]:
        blocks, found = range(len(arm.tower.blocks)), []
        for sample in samples:
            with observe(arm.model, states=blocks) as seen:
                run(arm.model, arm.inputs(sample.path, self.side))
            states = [seen.states[block][0, arm.tower.prefix :] for block in blocks]
            found.append(torch.stack(states).float().norm(dim=-1).cpu())  # (blocks, patches)
        return found

    def measure(self, seen: list[Tensor], unpatched: list[Tensor]) -> Measures:
        medians = torch.cat(unpatched, dim=1).median(dim=1).values  # (blocks,)
        if len(medians) != len(seen[0]):  # another model: its own medians are the measure
            medians = torch.cat(seen, dim=1).median(dim=1).values
        shares = torch.stack([(norms > self.times * medians[:, None]).float().mean(dim=1) for norms in seen])
        largest = torch.stack([norms.amax(dim=1) for norms in seen])  # (images, blocks)
        found: Measures = {}
        for block in range(len(medians)):
            middle = torch.stack([norms[block].median() for norms in seen])
            high = torch.stack([norms[block].quantile(0.99) for norms in seen])
            row = partial(Measure, setting=f"block {block}")
            found[f"outlier patches, block {block}"] = row(shares[:, block].numpy())
            found[f"images with one, block {block}"] = row((shares[:, block] > 0).float().numpy())
            found[f"median norm, block {block}"] = row(middle.numpy(), unit="")
            found[f"p99 norm, block {block}"] = row(high.numpy(), unit="")
            found[f"largest norm, block {block}"] = row(largest[:, block].numpy(), unit="", statistic=np.max)
        return found


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
        return torch.cat([answer(arm, arm.inputs(sample.path, self.side))[1] for sample in samples])

    def measure(self, seen: Tensor, unpatched: Tensor) -> Measures:
        if seen.shape != unpatched.shape:
            return {}  # another model's answers lie in another space
        found = metrics.agreement(seen, unpatched)
        same = Measure(found.same.float().numpy())
        return {"cosine of the output": Measure(found.cosine.numpy(), unit=""), "same largest entry": same}
