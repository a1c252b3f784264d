"""How many registers for how many patches: the count belongs to the resolution, by a line that is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from .errors import BadPlan

MOST_REGISTERS = 1024  # far beyond any use; a plan file is not trusted with the size of an allocation
MOST_PATCHES = 2**20
UNIT = 2**24  # parts of a register that the line is drawn in: whole numbers, which every tracer follows


@dataclass(frozen=True)
class Law:
    """`registers = slope * patches + offset`, rounded, at least one: a line, which may have another slope at its start.

    Args:
        slope: registers per patch, 0 where their number stays.
        offset: registers at no patch, where the line would begin.
        fewest, most: the patches per image of the smallest and the largest size that it was measured at.
        bend: so many patches has an image where the line bends; 0 = nowhere.
        below: registers per patch up to there.

    Raises:
        BadPlan: a value is of the wrong type, or gives no register, or absurdly many, at a size that was measured.
    """

    slope: float
    offset: float
    fewest: int
    most: int
    bend: int = 0
    below: float = 0.0

    def __post_init__(self) -> None:
        for name in ("slope", "offset", "below"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MOST_REGISTERS:
                raise BadPlan(f"the law's {name} must be a number up to {MOST_REGISTERS}, not {value!r:.50}.")
            object.__setattr__(self, name, float(value))
        for name in ("fewest", "most", "bend"):
            value, least = getattr(self, name), 0 if name == "bend" else 1
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST_PATCHES:
                raise BadPlan(
                    f"the law's {name} must be a number of patches, a whole one from {least}, not {value!r:.50}."
                )
        if self.fewest > self.most:
            raise BadPlan(f"the law was measured at {self.fewest} to {self.most} patches, which is no span.")
        for patches in (self.fewest, self.most):
            count = self._counted(patches)
            if not 1 <= count <= MOST_REGISTERS:
                raise BadPlan(
                    f"the law gives {count} registers for {patches} patches; 1 to {MOST_REGISTERS} make sense, and "
                    f"usually 1 to 32."
                )

    def __call__(self, patches: int) -> int:
        """How many registers an image of `patches` patches has.

        In whole numbers alone, so that a symbolic number of patches gives a symbolic number of registers.
        """
        count = self._counted(patches)
        if isinstance(count, int):
            return max(1, min(count, MOST_REGISTERS))
        least: Any = torch.sym_max(1, torch.sym_min(count, MOST_REGISTERS))
        return least

    def _counted(self, patches: Any) -> Any:
        count = round((self.offset + 0.5) * UNIT)
        if self.bend:
            short = torch.sym_max(self.bend - patches, 0)  # of the bend
            patches, count = patches + short, count - round(self.below * UNIT) * short
        return (round(self.slope * UNIT) * patches + count) // UNIT if self.slope or self.bend else count // UNIT

    @property
    def constant(self) -> bool:
        """Whether it gives the same number at every size."""
        return not self.slope and not (self.bend and self.below)

    def reaches(self, patches: int) -> bool:
        """Whether `patches` is no more than twice beyond what was measured."""
        return self.fewest <= 2 * patches and patches <= 2 * self.most

    def __str__(self) -> str:
        if self.constant:
            return f"{self(self.most)} at every size"
        return f"{self(self.fewest)} for {self.fewest} patches to {self(self.most)} for {self.most}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Law:
        """The inverse of `to_dict`; nothing in `values` is trusted.

        Raises:
            BadPlan: anything but the values that `to_dict` gives.
        """
        needed, known = {"slope", "offset", "fewest", "most"}, {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or not needed <= set(values) <= known:
            raise BadPlan(f"the plan's law must be a JSON object of {', '.join(sorted(known))}, not {values!r:.100}.")
        return cls(**values)
