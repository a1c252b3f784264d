"""What every task of an evaluation has in common.

A task looks at every sample through every arm, then turns what it saw into measures: per-image values and the statistic
over images, so that intervals and differences between arms can be drawn from the same images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...finding.trial import Threshold
from ...images import labels
from ...images.labels import Sample
from ..arms import Arm

Statistic = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class Measure:
    """One number of one arm, with what it takes to resample it.

    Attributes:
        values: per image, `(images, ...)`.
        statistic: of such values of any images, in the last axis but those of one image; one value for each draw in
            front of it. None = the mean.
        unit: "%" values are shares of 1.
        setting: what was fixed or swept to get it.
        kind: "fixed"; "block", for one of many blocks; one of a "sweep", whose best is chosen on the test set; or a
            "floor", which needs no model.
    """

    values: np.ndarray
    unit: str = "%"
    statistic: Statistic | None = None
    setting: str = ""
    kind: str = "fixed"

    def of(self, index: np.ndarray) -> Any:
        """The value over images `index` `(images,)`, or for each of several draws `(draws, images)`."""
        picked = self.values[index]
        return picked.mean(axis=-1) if self.statistic is None else self.statistic(picked)


Measures = dict[str, Measure]


@dataclass
class Task(ABC):
    """Base of all tasks.

    Attributes:
        side: pixels of the shorter side of photos; None = however the processor does it.
        threshold: from which norm on a patch is an outlier, where outliers are counted or repaired; None = as when the
            plan was found.
    """

    name: ClassVar[str]
    repairable: ClassVar[bool] = True  # whether a repair of what is read from the model means something here
    counts_outliers: ClassVar[bool] = False
    side: int | None = None
    threshold: Threshold | None = field(default=None, kw_only=True)

    def samples(self, data: str | Path) -> list[Sample]:
        return labels.photos(data)

    @abstractmethod
    def look(self, arm: Arm, samples: Iterable[Sample]) -> Any:
        """Run the arm's model, as it is now, over the samples."""

    @abstractmethod
    def measure(self, seen: Any, unpatched: Any) -> Measures:
        """Measures of what an arm saw, given what the unpatched one did."""

    def floor(self, samples: list[Sample], unpatched: Any) -> Measures:
        """What answers that look at no photo score."""
        return {}
