"""Text -> token ids, as a language model is given them.

May import `runtime`. Read `tokens` first.
"""

from .tokens import tokens as tokenize

__all__ = ["tokenize"]
