"""Test-time registers for pretrained Vision Transformers, without training.

Find the few MLP neurons that write high-norm artefact patches, and move them into registers: `find`, then `patch`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import registration
from .errors import BadCheckpoint, BadImages, BadPlan, Harmful, NoOutliers, TestregError, UnsupportedModel

if TYPE_CHECKING:
    from .checkpoint import load, save
    from .families import FAMILIES, Family
    from .inspection import inspect
    from .patch import Patch, active, patch
    from .plan import RegisterPlan
    from .search import find

__all__ = [
    "FAMILIES",
    "BadCheckpoint",
    "BadImages",
    "BadPlan",
    "Family",
    "Harmful",
    "NoOutliers",
    "Patch",
    "RegisterPlan",
    "TestregError",
    "UnsupportedModel",
    "active",
    "find",
    "inspect",
    "load",
    "patch",
    "save",
]

# Loaded when first used: torch and transformers take seconds to import, which `testreg --help` must not.
LAZY = {
    "FAMILIES": "families",
    "Family": "families",
    "Patch": "patch",
    "RegisterPlan": "plan",
    "active": "patch",
    "find": "search",
    "inspect": "inspection",
    "load": "checkpoint",
    "patch": "patch",
    "save": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{LAZY[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """`testreg.patch` is the function: Python would bind the module of that name there when it is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package  # before anything is imported
registration.register()
