"""From images, or text, to a plan: what a model does, which neurons do it, and which registers take their place.

May import `images`, `text`, `metrics` and `runtime`. Read `search` first, which is `find` from end to end: `scan` sums
up what images do in the model, `detect` says which patches are outliers and ranks neurons, `choose` tries plans, each
on the bench of `trial`. `inspection` looks without choosing; `observe` is how anybody looks inside. For language models
`text_search`, `massive`, `text_choose` and `text_trial` are what `search`, `scan`, `choose` and `trial` are for images.
"""

from .inspection import Inspection, inspect
from .observe import observe, run, unpatched
from .search import find
from .trial import Threshold

__all__ = ["Inspection", "Threshold", "find", "inspect", "observe", "run", "unpatched"]
