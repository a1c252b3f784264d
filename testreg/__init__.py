"""Test-time registers for pretrained Vision Transformers, without training.

Find the few MLP neurons that write high-norm artefact patches, and move them into registers: `find`, then `patch`.

The package is a house of rooms, each of which may import those below it (`make lint` checks it): `cli`; `judging`,
`demo` and `testing`; `export`; `checkpoints` and `finding`; `images` and `text`; `runtime` and `metrics`. Each room's
`__init__.py` says what it is for.
"""

from typing import TYPE_CHECKING

from .runtime import __version__, lazily, registration
from .runtime.errors import (
    BadCheckpoint,
    BadImages,
    BadPlan,
    BadText,
    Harmful,
    NoOutliers,
    TestregError,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from .checkpoints.saving import save
    from .export.forms import export
    from .finding.inspection import inspect
    from .finding.search import find
    from .runtime.families import FAMILIES, Family
    from .runtime.installer import Patch, active, patch
    from .runtime.modeling_testreg import load
    from .runtime.plan import RegisterPlan
    from .runtime.streaming import StreamingCache

__all__ = [
    "FAMILIES",
    "BadCheckpoint",
    "BadImages",
    "BadPlan",
    "BadText",
    "Family",
    "Harmful",
    "NoOutliers",
    "Patch",
    "RegisterPlan",
    "StreamingCache",
    "TestregError",
    "UnsupportedModel",
    "__version__",
    "active",
    "export",
    "find",
    "inspect",
    "load",
    "patch",
    "save",
]

if not TYPE_CHECKING:  # or checkers would take any name
    __getattr__ = lazily(
        __name__,
        {
            **dict.fromkeys(
                ("FAMILIES", "Family", "Patch", "RegisterPlan", "StreamingCache", "active", "load", "patch"), "runtime"
            ),
            **dict.fromkeys(("find", "inspect"), "finding"),
            "save": "checkpoints",
            "export": "export",
        },
    )


def __dir__() -> list[str]:
    return __all__


registration.register()
