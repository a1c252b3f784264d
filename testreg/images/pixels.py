"""An image processor for models that come without one: makers' own code, checkpoints without a preprocessor config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..runtime.errors import BadImages
from . import decode


@dataclass(frozen=True)
class Pixels:
    """Photos -> pixel values: shorter side to `size` (bicubic), the middle square, each channel normalised.

    Args:
        size: side of the square in pixels, such as the size that the model was trained at.
        mean, std: of each channel, of values in 0..1, as the model's maker says. Those of ImageNet by default.

    Raises:
        BadImages: a value is out of range.
    """

    size: int = 224
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1:
            raise BadImages(f"size must be a whole number of pixels, not {self.size!r}.")
        for name, least in (("mean", -float("inf")), ("std", 0.0)):
            values = getattr(self, name)
            right = isinstance(values, (list, tuple)) and len(values) == 3
            if not right or not all(isinstance(value, (int, float)) and least < value < 1e6 for value in values):
                raise BadImages(
                    f"{name} must be three numbers, red, green and blue, of pixels in 0..1, not {values!r}."
                )

    @property
    def image_mean(self) -> list[float]:
        return list(self.mean)

    @property
    def image_std(self) -> list[float]:
        return list(self.std)

    def __call__(self, photo: Image.Image, *, do_resize: bool = True, **_: Any) -> dict[str, Tensor]:
        """Pixel values `(1, 3, size, size)`; of the photo's own size without `do_resize`."""
        if do_resize:
            photo = self._square(photo)
        values = torch.from_numpy(np.asarray(photo, dtype=np.float32) / 255).permute(2, 0, 1)
        mean, std = (torch.tensor(list(row))[:, None, None] for row in (self.mean, self.std))
        return {"pixel_values": ((values - mean) / std)[None]}

    def _square(self, photo: Image.Image) -> Image.Image:
        scale = self.size / min(photo.size)
        width, height = (max(self.size, round(length * scale)) for length in photo.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        resized = photo.resize((width, height), Image.Resampling.BICUBIC)
        return resized.crop((left, top, left + self.size, top + self.size))


def processor_from(given: Any) -> Any:
    """An image processor from whatever says which: itself, the name of a checkpoint, or `size`, `mean` and `std`.

    Raises:
        BadImages: there is no such checkpoint, or a value is out of range.
    """
    if isinstance(given, Mapping) and set(given) <= {"size", "mean", "std"}:
        return Pixels(**given)
    if not isinstance(given, str):
        return getattr(given, "image_processor", given)  # a full processor has one
    from transformers import AutoImageProcessor  # slow to import

    try:
        return AutoImageProcessor.from_pretrained(given)
    except Exception as error:  # whatever a damaged file or an unreachable hub raises
        raise BadImages(
            f"there is no usable image processor with {given!r} ({decode.reason(error)}): give the name or directory "
            f"of a checkpoint that has one, or a size, mean and standard deviation."
        ) from error
