"""Forms of a patched model that need no testreg where they are used.

May import every room but `judging`, `demo` and `cli`. Read `onnx` for engines, `bake` for stock weights.
"""

from .bake import export_stock
from .onnx import export_onnx

__all__ = ["export_onnx", "export_stock"]
