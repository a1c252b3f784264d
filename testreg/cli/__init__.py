"""The command line: words in, words out, and an exit code; what a command does is done by the rooms below.

May import every room. Read `group` first: the options that commands share, and how a model is loaded; `console` is how
commands end, `words` what they say. One file per group of commands.
"""

from . import demo, export, finding, judging  # noqa: F401 - each adds its commands to `main`
from .group import main

__all__ = ["main"]
