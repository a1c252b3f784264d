"""Test-time registers for pretrained Vision Transformers, without training.

Find the few MLP neurons that write high-norm artefact patches, and move them into registers: `find`, then `patch`.
"""

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
    "patch",
]
