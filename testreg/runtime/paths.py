"""Dotted paths from a module to its parts, as the rows of `families` write them."""

from __future__ import annotations

from typing import Any


def reach(module: Any, paths: str | tuple[str, ...]) -> Any:
    """The attribute at a dotted path, or at the first of several that is there; None where there is none."""
    for path in each(paths):
        found: Any = module
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return found
    return None


def each(names: str | tuple[str, ...]) -> tuple[str, ...]:
    """The paths or class names of a row's field, which may be one or several."""
    return (names,) if isinstance(names, str) else tuple(names)
