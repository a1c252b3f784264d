"""What a checkpoint with registers carries with it: enough to load one and run it where testreg is not installed.

Imports nothing else of the package, since these files are copied into every checkpoint as they are. Read `plan` first
(what is done to a model, as a value), then `installer` (it is done, and undone), `forwards` (by which modules) and
`redirect` (the tensors). `families` says where each kind of Vision Transformer keeps its parts, `towers` finds them,
`errors` says what can go wrong. Of language models, `decoders` finds the parts, `prefix` is what their attention does,
and `streaming` reads text without end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .families import FAMILIES, Family
    from .installer import Patch, active, patch
    from .modeling_testreg import load
    from .plan import RegisterPlan
    from .streaming import StreamingCache
    from .towers import Tower, find_tower

__version__ = "0.2.0"

__all__ = [
    "FAMILIES",
    "Family",
    "Patch",
    "RegisterPlan",
    "StreamingCache",
    "Tower",
    "active",
    "find_tower",
    "lazily",
    "load",
    "patch",
]


def lazily(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose `names` come from the modules beside them, imported when first asked for.

    Torch and transformers take seconds to import, which `import testreg` and `testreg --help` must not. A name that is
    the module's own stands for the module.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = import_module(f".{names[name]}", package)
        return found if names[name] == name else getattr(found, name)

    return find


if not TYPE_CHECKING:  # or checkers would take any name
    __getattr__ = lazily(
        __name__,
        {
            **dict.fromkeys(("FAMILIES", "Family"), "families"),
            **dict.fromkeys(("Tower", "find_tower"), "towers"),
            **dict.fromkeys(("Patch", "active", "patch"), "installer"),
            "RegisterPlan": "plan",
            "StreamingCache": "streaming",
            "load": "modeling_testreg",
        },
    )
