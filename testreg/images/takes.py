"""What a model takes pictures as: images of how many channels, or clips of how many frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..runtime.errors import BadImages, UnsupportedModel
from ..runtime.paths import reach
from ..runtime.towers import find_tower

PIXELS = ("pixel_values", "pixel_values_videos")  # what models call them


@dataclass(frozen=True)
class Takes:
    """What a model takes; without a model, RGB images, and nothing is checked.

    Attributes:
        model: its class name.
        channels: of an image or a frame.
        frames: of a clip; None where it takes images.
        exact: clips have to have so many frames; else so many are taken of longer ones.
        packed: it takes the patches of images of any size as one sequence.
    """

    model: str = ""
    channels: int = 3
    frames: int | None = None
    exact: bool = False
    packed: bool = False

    @property
    def mode(self) -> str:
        """Pillow's, of the pictures that its processor gets."""
        return "L" if self.channels == 1 else "RGB"

    @property
    def wanted(self) -> str:
        """What it takes, in words that end a sentence."""
        if self.frames is None:
            return f"{self.model} takes images: take frames out of it, and give these."
        return (
            f"{self.model} takes clips{f' of {self.frames} frames' * self.exact}: give a folder that holds one folder "
            f"of frames, or one video file, per clip; a list of such lists of frames; or a tensor (clips, frames, "
            f"channels, height, width)."
        )

    def check(self, inputs: Mapping[str, Tensor], name: str) -> None:
        """Whether the model takes processed `inputs`.

        Raises:
            BadImages: they are images and it takes clips, or clips and it takes images, or they have another number of
                channels or frames; `name` says whose.
        """
        shape = tuple(pixels(inputs).shape)  # (images, channels, height, width) or (clips, frames, channels, ...)
        if not self.model or self.packed or len(shape) not in (4, 5):  # or images come as patches
            return
        if len(shape) == 5 and self.frames is None:
            raise BadImages(
                f"{name} is a clip, of the shape {shape[1:]}, and {self.model} takes images (images, channels, height, "
                f"width): pass clips.flatten(0, 1)."
            )
        if len(shape) == 4 and self.frames is not None:
            raise BadImages(f"{name} is an image, of the shape {shape[1:]}, and {self.wanted}")
        if self.channels not in shape[1:-2]:
            raise BadImages(
                f"{name} has {shape[-3]} channel{'s' * (shape[-3] != 1)}, of the shape {shape[1:]}, and {self.model} "
                f"takes {self.channels}."
            )
        if len(shape) == 5 and self.exact and shape[1] != self.frames:
            raise BadImages(f"{name} has {shape[1]} frames, of the shape {shape[1:]}, and {self.wanted}")


def taken_by(model: Any) -> Takes:
    """What `model` takes, as its weights have it; RGB images where there is no model."""
    if model is None:
        return Takes()
    try:
        found = find_tower(model)
    except UnsupportedModel:  # whoever needs it to be a Vision Transformer says so
        return Takes()
    tower: nn.Module = found.module
    embed = next((part for part in tower.modules() if isinstance(part, (nn.Conv2d, nn.Conv3d))), None)
    channels = embed.in_channels if embed else reach(tower, "config.num_channels") or 3
    if found.row.packed or not isinstance(embed, nn.Conv3d):  # a photo is a clip of one frame to the former
        return Takes(type(tower).__name__, int(channels), packed=found.row.packed)
    fixed = reach(tower, "config.num_frames")  # its table of positions is so long; others turn with the frames
    return Takes(
        type(tower).__name__, channels, int(fixed or reach(tower, "config.frames_per_clip") or 16), bool(fixed)
    )


def pixels(inputs: Mapping[str, Any]) -> Any:
    """The images or clips among inputs of a model; None where there are none."""
    return next((inputs[name] for name in PIXELS if name in inputs), None)
