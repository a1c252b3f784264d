"""Test-time registers for pretrained Vision Transformers, without training.

Find the few MLP neurons that write high-norm artefact patches, and move them into registers: `find`, then `patch`.
"""

from importlib import import_module
from typing import Any

from . import registration
from .errors import BadCheckpoint, BadImages, BadPlan, Harmful, NoOutliers, TestregError, UnsupportedModel
from .families import FAMILIES, Family
from .patch import Patch, active, patch
from .plan import RegisterPlan

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

registration.register()


# Loaded when first used: they need transformers, which takes a second to import.
LAZY = {"find": "search", "inspect": "inspection", "load": "checkpoint", "save": "checkpoint"}


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(import_module(f".{LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
