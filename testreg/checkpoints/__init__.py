"""Checkpoints on the disk and on the hub: patched ones written, unpatched ones loaded with care.

May import `runtime`, which is what loads a patched one. Read `saving` first; `original` loads what is to be patched,
`atomic` makes that a file or a directory is there whole or not at all.
"""

from typing import TYPE_CHECKING

from ..runtime import lazily

if TYPE_CHECKING:
    from .original import is_patched, load_base
    from .saving import save

__all__ = ["is_patched", "load_base", "save"]

if not TYPE_CHECKING:  # or checkers would take any name
    __getattr__ = lazily(__name__, {"is_patched": "original", "load_base": "original", "save": "saving"})
