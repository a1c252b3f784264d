"""Whatever holds images -> batches of model inputs.

May import `runtime`. Read `streaming` first: `takes` says what the model takes, `sources`, for models of videos
`clips`, walks through what was given, `decode` makes pictures of it, and the model's own processor, found by
`processors`, makes inputs of those. `labels` reads boxes, masks and classes beside photos.
"""

from .processors import processor_for
from .streaming import Batch, ImageStream, stream

__all__ = ["Batch", "ImageStream", "processor_for", "stream"]
