"""Dotted paths from a module to its parts, as the rows of `families` write them."""

from __future__ import annotations

from typing import Any


def reach(module: Any, paths: str | tuple[str, ...]) -> Any:
    """The attribute at a dotted path, or at the first of several that is there; None where there is none."""
    path = path_to(module, paths)
    return None if path is None else walk(module, path)


def path_to(module: Any, paths: str | tuple[str, ...]) -> tuple[str, ...] | None:
    """The dotted path, or the first of several, at which there is something, in its parts; None where there is none."""
    parts = (tuple(path.split(".")) for path in each(paths))
    return next((path for path in parts if walk(module, path) is not None), None)


def walk(module: Any, path: tuple[str, ...]) -> Any:
    """The attribute at a path in its parts; None where there is none."""
    for name in path:
        module = getattr(module, name, None)
    return module


def each(names: str | tuple[str, ...]) -> tuple[str, ...]:
    """The paths or class names of a row's field, which may be one or several."""
    return (names,) if isinstance(names, str) else tuple(names)
