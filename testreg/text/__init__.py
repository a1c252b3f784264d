"""Text -> token ids, as a language model is given them.

May import `runtime`. Read `tokens` first, which is for looking; `streams` reads text of any length for finding.
"""

from .tokens import tokens as tokenize

__all__ = ["tokenize"]
