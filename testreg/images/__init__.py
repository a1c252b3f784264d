"""Whatever holds images -> batches of model inputs.

May import `runtime`. Read `streaming` first: `sources` walks through what was given, `decode` makes pictures of it,
and the model's own processor makes inputs of those. `labels` reads boxes, masks and classes beside photos.
"""

from .streaming import Batch, ImageStream, processor_for, stream

__all__ = ["Batch", "ImageStream", "processor_for", "stream"]
