"""Outliers of several kinds, and what registers hold that stand for them."""

from __future__ import annotations

import torch
from torch import Tensor


class Kinds:
    """Outliers in kinds, parted by the direction of their states.

    k-means from seeds that lie far apart, so that nothing is left to chance.

    Args:
        states: of the outliers `(outliers, channels)`.
        count: how many kinds.
    """

    def __init__(self, states: Tensor, count: int):
        directions = torch.nn.functional.normalize(states, dim=1)
        seeds = [int((directions @ directions.mean(0)).argmax())]
        while len(seeds) < min(count, len(states)):
            seeds.append(int((directions @ directions[seeds].T).amax(1).argmin()))
        centres = directions[seeds]
        for _ in range(20):
            kind = (directions @ centres.T).argmax(1)  # (outliers,)
            means = [directions[kind == index].mean(0) for index in range(len(centres)) if (kind == index).any()]
            centres = torch.nn.functional.normalize(torch.stack(means), dim=1)
        self.kind = (directions @ centres.T).argmax(1)
        self.sizes = torch.bincount(self.kind, minlength=len(centres))

    def mean(self, values: Tensor, registers: int) -> Tensor:
        """What `registers` hold `(registers, any)`, by `values` of the outliers `(outliers, any)`.

        Each kind gets registers by its share of outliers, at least one, which hold its mean.
        """
        shares = torch.ones(len(self.sizes), dtype=torch.long)
        while shares.sum() < registers:  # the next register goes where the most outliers share one
            shares[(self.sizes / shares).argmax()] += 1
        rows = torch.stack([values[self.kind == index].mean(0) for index in range(len(self.sizes))])
        return rows.repeat_interleave(shares, dim=0)[:registers]
