"""Whether anything that a patch was put on was exchanged: told by identities alone, since every pass asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


class Seal:
    """Places in a model and what lay there. An empty one does not hold, nor does a copy: it was put on another model.

    Attributes:
        possible: whether every module lies where it can be found; otherwise it never holds.

    Args:
        module: the tower.
        worn: modules of it whose forwards are sealed, and every place on the way to them.
        others: modules of which only the way is.
    """

    def __init__(
        self, module: nn.Module | None = None, worn: Sequence[nn.Module] = (), others: Sequence[nn.Module] = ()
    ):
        self.places: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        self.counts: dict[int, tuple[dict[str, Any], int]] = {}  # of the parts of those on the way
        wanted, found = {id(part) for part in (*worn, *others)}, set[int]()
        for part in worn:
            self._add(part.__dict__, "forward", part.__dict__.get("forward"))
        for path, part in module.named_modules(remove_duplicate=False) if module is not None else ():
            if id(part) in wanted:
                found.add(id(part))
                self._way(module, path)
        self.possible = found == wanted

    def _way(self, module: Any, path: str) -> None:
        for name in filter(None, path.split(".")):
            parts = module._modules
            self.counts[id(parts)] = parts, len(parts)
            self._add(parts, name, module := parts[name])

    def _add(self, place: dict[str, Any], name: str, value: Any) -> None:
        self.places[id(place), name] = place, name, value

    def holds(self) -> bool:
        """Whether everything still lies where it lay."""
        for place, name, value in self.places.values():
            if place.get(name) is not value:
                return False
        for parts, count in self.counts.values():
            if len(parts) != count:
                return False
        return self.possible and bool(self.places)

    def __reduce__(self) -> Any:
        return Seal, ()
