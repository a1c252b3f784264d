"""How far depths are from the true ones."""

from __future__ import annotations

from torch import Tensor


def rmse(found: Tensor, true: Tensor) -> float:
    """Root of the mean squared error over pixels of one photo, in metres: maps `(height, width)`, 0 where unknown."""
    known = true > 0
    return float((found[known].double() - true[known].double()).square().mean().sqrt())
