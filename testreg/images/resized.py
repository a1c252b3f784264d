"""The same images at another size than a processor's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Resized:
    """An image processor of transformers, all of whose sizes are `factor` times its own.

    Args:
        processor: one with a `size`, and perhaps a `crop_size`, in pixels.
    """

    def __init__(self, processor: Any, factor: float):
        self.processor = processor
        self.model_input_names = processor.model_input_names
        self.sizes = {
            name: {edge: round(factor * pixels) for edge, pixels in dict(given).items() if isinstance(pixels, int)}
            for name in ("size", "crop_size")
            if (given := getattr(processor, name, None))
        }

    def __call__(self, image: Any, **more: Any) -> Any:
        return self.processor(image, **{**more, **self.sizes})


def resized(processor: Callable[..., Any] | None, factor: float) -> Resized | None:
    """`processor` at another size; None where it does not say its own."""
    known = hasattr(processor, "model_input_names") and hasattr(getattr(processor, "size", None), "items")
    return Resized(processor, factor) if known else None
