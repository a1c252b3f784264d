"""Confidence intervals: of a share, and of anything by resampling images."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

BATCH = 100  # draws at a time, so that memory stays small


class Interval(NamedTuple):
    """A value with the ends of its confidence interval."""

    value: float
    low: float
    high: float


def share(hits: int, of: int, *, level: float = 0.95) -> Interval:
    """A share with its interval by Wilson (1927), which is honest also where all hit, or few were looked at."""
    if not of:
        return Interval(float("nan"), float("nan"), float("nan"))
    z = NormalDist().inv_cdf(0.5 + level / 2)
    found = hits / of
    middle = (found + z**2 / (2 * of)) / (1 + z**2 / of)
    reach = z / (1 + z**2 / of) * (found * (1 - found) / of + z**2 / (4 * of**2)) ** 0.5
    return Interval(found, max(0.0, middle - reach), min(1.0, middle + reach))


def bootstrap(
    statistic: Callable[[np.ndarray], Any], images: int, *, level: float = 0.95, resamples: int = 2000
) -> Interval:
    """Percentile interval of `statistic` over images drawn with replacement; the same draws at every call.

    Args:
        statistic: of image indices `(images,)`, some of them more than once; or one value for each of several draws
            `(draws, images)`. A difference of two arms on the same indices makes the interval a paired one.
        level: of confidence, 0..1.
    """
    from scipy import stats  # of the extra "evaluate"

    value = float(statistic(np.arange(images)))
    if images < 2:
        return Interval(value, float("nan"), float("nan"))
    found = stats.bootstrap(
        (np.arange(images),),
        lambda index, axis=-1: statistic(index),
        vectorized=True,
        batch=BATCH,
        n_resamples=resamples,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return Interval(value, float(found.confidence_interval.low), float(found.confidence_interval.high))
