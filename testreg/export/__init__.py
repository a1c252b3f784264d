"""Forms of a patched model that need no testreg where they are used.

May import every room but `judging`, `demo` and `cli`. Read `forms` first: `testreg.export(model, out)` writes any of
them, since the room itself can be called. Then `onnx` for engines, `int8` for small ones, `bake` for stock weights.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..runtime import lazily

if TYPE_CHECKING:
    from .bake import export_stock
    from .checking import Check
    from .forms import export
    from .int8 import export_int8
    from .onnx import export_onnx
    from .quantiser import Int8
    from .rest import put_at_rest

__all__ = ["Check", "Int8", "export", "export_int8", "export_onnx", "export_stock", "put_at_rest"]

if not TYPE_CHECKING:  # or checkers would take any name
    __getattr__ = lazily(
        __name__,
        {
            "Check": "checking",
            "Int8": "quantiser",
            "export": "forms",
            "export_int8": "int8",
            "export_onnx": "onnx",
            "export_stock": "bake",
            "put_at_rest": "rest",
        },
    )


class _Callable(ModuleType):
    """A room with the name of what is done in it: Python binds it in the package, where the function would be."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `testreg.export.forms.export`."""
        return self.export(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
