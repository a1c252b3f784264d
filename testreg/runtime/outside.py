"""Families that other packages bring, as entry points of the group `testreg.families`.

    [project.entry-points."testreg.families"]
    garden-vit = "garden.rows:GARDEN_VIT"

An entry point names a `Family`, or a mapping of names to several. It is loaded only where a model is of no family known
here, so a package that brings rows costs nothing until then; best it keeps them in a module that imports little.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import FamilyLeftOut

GROUP = "testreg.families"


@cache
def rows(kind: type) -> Mapping[str, Any]:
    """Name -> row of the class `kind`, of every installed package that brings some; asked once per process.

    A package whose rows cannot be had is left out, with a warning that names it.
    """
    found: dict[str, Any] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        try:
            found |= _of(point, kind)
        except Exception as error:  # a stranger's code, run on import
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"the families of {_whose(point)} are left out: {reason}", FamilyLeftOut, stacklevel=2)
    return found


def add(known: dict[str, Any], kind: type) -> bool:
    """Add what packages bring to `known` rows, but for names that are taken; whether there was anything to add."""
    brought = {name: row for name, row in rows(kind).items() if known.get(name) is not row}
    for name in brought.keys() & known.keys():
        message = f"the family {name!r} that a package brings is left out: there is one of that name already"
        warnings.warn(message, FamilyLeftOut, stacklevel=2)
        del brought[name]
    known.update(brought)
    return bool(brought)


def _of(point: EntryPoint, kind: type) -> dict[str, Any]:
    value = point.load()
    named = value if isinstance(value, Mapping) else {point.name: value}
    return {str(name): _as(kind, row) for name, row in named.items()}


def _as(kind: Any, row: Any) -> Any:
    """The row itself; in a checkpoint's copy of this file, which has a class of its own, the same values."""
    if isinstance(row, kind):
        return row
    if is_dataclass(row) and {column.name for column in fields(row)} == {column.name for column in fields(kind)}:
        return kind(**vars(row))
    raise TypeError(f"a testreg.Family is needed, or a mapping of names to such, not a {type(row).__name__}")


def _whose(point: EntryPoint) -> str:
    package = f"the package {point.dist.name} {point.dist.version}" if point.dist else "a package"
    return f"{package} ({point.name} = {point.value})"
