"""A patch made of weights alone, in stock architectures with register slots: no code at run time, nothing dynamic.

`docs/bake.md` has the algebra and what was measured.
"""

from .baked import Baked, bake, export_stock
from .drift import Drift

__all__ = ["Baked", "Drift", "bake", "export_stock"]
