"""The same images at another size than a processor's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ASKED = ("model_input_names", "image_mean", "image_std", "do_normalize", "do_image_splitting")  # by `processors.call`


class Resized:
    """An image processor of transformers, all of whose sizes are `factor` times its own.

    Args:
        processor: one with a `size`, and perhaps a `crop_size`, in pixels.
    """

    def __init__(self, processor: Any, factor: float):
        self.processor = processor
        for name in ASKED:
            if hasattr(processor, name):
                setattr(self, name, getattr(processor, name))
        self.sizes = {
            name: {edge: round(factor * pixels) for edge, pixels in own.items()}
            for name in ("size", "crop_size")
            if (own := edges(processor, name))
        }

    def __call__(self, image: Any, **more: Any) -> Any:
        return self.processor(image, **{**more, **self.sizes})


def resized(processor: Callable[..., Any] | None, factor: float) -> Resized | None:
    """`processor` at another size; None where it does not say its own."""
    known = hasattr(processor, "model_input_names") and edges(processor, "size")
    return Resized(processor, factor) if known else None


def edges(processor: Any, name: str) -> dict[str, int]:
    """The edges in pixels of a processor's size, by name; none where it has another kind of size, or none."""
    given = getattr(processor, name, None)
    pairs = dict(given).items() if given and not isinstance(given, (int, str)) else ()
    return {edge: pixels for edge, pixels in pairs if isinstance(pixels, int) and "pixels" not in edge}


def at_side(processor: Any, side: int) -> Resized | None:
    """`processor` with a shorter side of `side` pixels; None where it does not say its own."""
    own = edges(processor, "crop_size") if getattr(processor, "do_center_crop", False) else {}
    own = own or edges(processor, "size")
    return resized(processor, side / min(own.values())) if own else None
