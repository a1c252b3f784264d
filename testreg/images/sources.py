"""Whatever holds images -> images one by one: files still unread, everything in memory checked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from numbers import Number
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..runtime.errors import BadImages
from . import decode
from .takes import PIXELS, Takes, pixels

IMAGE_COLUMNS = ("image", "img", "jpg", "png")  # what data sets call their images
LABELS = ("labels", "label")  # what they are called beside pixel_values; no model needs them to see
EXPECTED = (
    "Expected: a folder or files of photos, PIL images, arrays, tensors of pixel values (images, channels, height, "
    "width), dicts with pixel_values, or an iterable of these."
)


class Clip(NamedTuple):
    """A clip, still to be read.

    Attributes:
        source: its frames, each as an `Item` has its value; or the path, or the bytes, of a video file.
    """

    source: tuple[Path | bytes | Image.Image, ...] | Path | bytes


class Item(NamedTuple):
    """One image.

    Attributes:
        name: its path, or its place in what was given.
        value: a path or encoded bytes, still to be decoded; an upright picture; a clip; the processed inputs of one
            image or clip, each tensor with an axis of 1 first; or, as a string, why it is broken.
    """

    name: str
    value: Path | bytes | Image.Image | Clip | dict[str, Tensor] | str


class Source:
    """An iterable of `Item` over `images`, again and again where they allow it; see `testreg.images.stream`.

    Attributes:
        ignored: files that are hidden or not named like images, and labels, that the last iteration passed over.
        hint: what the last iteration saw that explains why there may be no image.
        once: some of it can be read only once, as the last iteration saw.
    """

    def __init__(self, images: Any, takes: Takes = Takes()):  # noqa: B008, it is frozen
        self.images, self.takes, self.ignored, self.started, self.hint, self.once = images, takes, 0, 0, "", False

    def __iter__(self) -> Iterator[Item]:
        self.ignored, self.hint = 0, ""
        self.started += 1
        return self._items(self.images, "images")

    @property
    def expected(self) -> int | None:
        """How many images there are, broken ones included; None where only reading them can tell."""
        return expected(self.images)

    def _items(self, value: Any, name: str) -> Iterator[Item]:
        """The images in `value` one by one: files and encoded bytes untouched, all else checked."""
        if isinstance(value, (str, os.PathLike)):
            path = existing(value)
            for file, named in decode.files(path) if path.is_dir() else [(path, True)]:
                if named:
                    yield Item(str(file), file)
                else:
                    self.ignored += 1
                    if file.suffix.lower() in decode.VIDEOS:
                        self.hint = self.hint or f"There are videos, such as {file.name}, and {self.takes.wanted}"
        elif isinstance(value, (bytes, bytearray)):
            yield Item(name, bytes(value))
        elif is_open(value):
            yield Item(name, self._read(value, name))
        elif isinstance(value, Image.Image):
            try:
                picture: Any = decode.upright(value, self.takes.mode)
            except Exception as error:  # opened from a broken file, which is read only now
                picture = decode.reason(error)
            yield Item(name, picture)
        elif isinstance(value, Tensor) and value.is_floating_point() and value.ndim in (3, 4, 5):
            yield from self._processed({"pixel_values": value if value.ndim > 3 else value[None]}, name)
        elif isinstance(value, (Number, np.generic)) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim < 2):
            self.ignored += 1
        elif isinstance(value, (Tensor, np.ndarray)):
            array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
            for index, picture in enumerate(array if array.ndim == 4 else [array]):
                at = f"{name}[{index}]" if array.ndim == 4 else name
                yield Item(at, decode.from_array(picture, at, self.takes.mode))
        elif isinstance(value, Mapping) and any(key in value for key in PIXELS):
            yield from self._processed(value, name)
        elif isinstance(value, Mapping):
            yield from self._items(_column(value, name), name)
        elif hasattr(value, "__iter__") or hasattr(value, "__getitem__"):
            for index, part in enumerate(self._parts(value)):
                yield from self._items(part, f"{name}[{index}]")
        else:
            raise BadImages(f"{name} is a {type(value).__name__}, which is no image and holds none. {EXPECTED}")

    def _processed(self, values: Mapping[str, Any], name: str) -> Iterator[Item]:
        try:
            inputs = {
                key: value.detach().cpu() if isinstance(value, Tensor) else torch.tensor(np.asarray(value))
                for key, value in values.items()
                if key in PIXELS or (isinstance(value, (Tensor, np.ndarray)) and key not in LABELS)
            }
        except (TypeError, ValueError) as error:
            raise BadImages(f"{name} holds values that make no tensor: {error}") from error
        key = next(name for name in PIXELS if name in inputs)
        if len(inputs) == 1 and inputs[key].ndim == (3 if self.takes.frames is None else 4):
            inputs[key] = inputs[key][None]  # a row of a data set: (channels, height, width), of clips with frames
        index = 0
        for part in apart(inputs):
            for image in range(check(part, name)):
                yield Item(f"{name}[{index}]", {key: value[image : image + 1].clone() for key, value in part.items()})
                index += 1

    def _parts(self, value: Any) -> Iterable[Any]:
        if not hasattr(value, "__iter__"):  # a map-style data set, which need not say where it ends
            return (value[index] for index in range(len(value)))
        parts = iter(value)
        if parts is not value:
            return parts
        self.once = True
        if self.started > 1:
            raise BadImages(self._used_up(value))
        return self._once(parts)

    def _once(self, parts: Iterator[Any]) -> Iterator[Any]:
        empty = True
        for part in parts:
            empty = False
            yield part
        if empty:
            self.hint = (
                f"The {type(parts).__name__} yielded nothing: it is empty, or was read before, and can be read only "
                f"once. Pass something that can be read again, such as a list."
            )

    def _read(self, file: Any, name: str) -> bytes:
        """All bytes of an open file, from its beginning."""
        if hasattr(file, "seekable") and file.seekable():
            file.seek(0)
        elif self.started > 1:
            raise BadImages(self._used_up(file))
        else:
            self.once = True
        content = file.read()
        if not isinstance(content, (bytes, bytearray)):
            raise BadImages(f"{name} is a file that is open as text: open it with open(path, 'rb').")
        return bytes(content)

    def _used_up(self, value: Any) -> str:
        return (
            f"the images come from a {type(value).__name__}, which an earlier iteration used up: "
            f"pass something that can be read again, such as list(images)."
        )


def is_open(value: Any) -> bool:
    """Whether `value` is an open file, of whatever library."""
    return hasattr(value, "read") and hasattr(value, "readable")


def apart(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Processed inputs with an axis of images; of images whose patches come as one sequence, one dict per image.

    Such sequences, `(all patches, ...)`, come with the grids of the images, `(images, 3)`: frames, rows and columns.
    What is no such sequence comes back as it is.
    """
    seen = inputs.get(PIXELS[0])
    for grid in (value for key, value in inputs.items() if "grid" in key and value.ndim == 2):
        lengths = grid.prod(-1)
        if seen is not None and seen.ndim and int(lengths.sum()) == len(seen):
            rest = {key: value for key, value in inputs.items() if key != PIXELS[0]}
            return [
                {PIXELS[0]: patches[None], **{key: value[image : image + 1] for key, value in rest.items()}}
                for image, patches in enumerate(seen.split(lengths.tolist()))
            ]
    return [inputs]


def check(inputs: Mapping[str, Tensor], name: str) -> int:
    """The number of images in processed `inputs`.

    Raises:
        BadImages: a tensor has no axis of images or another order of axes, or is not finite; `name` says whose.
    """
    shapes = {key: tuple(value.shape) for key, value in inputs.items()}
    seen: tuple[int, ...] = pixels(shapes) or ()
    images = seen[:1]
    if not images or any(shape[:1] != images for shape in shapes.values()):
        raise BadImages(f"{name} has tensors of the shapes {shapes}; each needs the same axis of images first.")
    packed = any("grid" in key for key in inputs)  # patches, each in the layout of its tower
    if not packed and len(seen) in (4, 5) and seen[-1] in decode.CHANNELS and seen[-3] not in decode.CHANNELS:
        order, permuted = ("images", "0, 3, 1, 2") if len(seen) == 4 else ("clips, frames", "0, 1, 4, 2, 3")
        raise BadImages(
            f"{name} has pixel values of the shape {seen}, where models take ({order}, channels, height, width): "
            f"pass tensor.permute({permuted})."
        )
    for key, value in inputs.items():
        if not value.isfinite().all():
            raise BadImages(f"{name} holds NaN or infinity in {key}: the images or their processing are broken.")
    return images[0]


def _column(row: Mapping[str, Any], name: str) -> Any:
    """The image in a row of a data set; Hugging Face's undecoded form is `{"bytes": ..., "path": ...}`."""
    if set(row) == {"bytes", "path"}:
        return row["path"] if row["bytes"] is None else row["bytes"]
    named = [row[key] for key in IMAGE_COLUMNS if key in row]
    found = named or [value for value in row.values() if isinstance(value, Image.Image)]
    if len(found) != 1:
        raise BadImages(
            f"{name} is a dict with the keys {', '.join(map(repr, row))}; one of pixel_values, "
            f"{', '.join(IMAGE_COLUMNS)}, or exactly one PIL image is needed. Pass the images alone, as in "
            f'(row["photo"] for row in images); of several splits, one.'
        )
    return found[0]


def existing(path: str | os.PathLike[str]) -> Path:
    """The path of a file or folder that exists, `~` expanded; BadImages otherwise."""
    full = os.path.expanduser(path)
    if not full or not os.path.exists(full):
        raise BadImages(f"there is no file or folder {os.fspath(path)!r}.")
    return Path(full)


def expected(images: Any) -> int | None:
    """How many images `images` holds, broken ones included; None where only reading it can tell."""
    if isinstance(images, (str, os.PathLike)) and os.path.isdir(path := os.path.expanduser(images)):
        return sum(named for _, named in decode.files(Path(path)))
    if isinstance(images, (str, os.PathLike, bytes, bytearray, Image.Image)) or is_open(images):
        return 1
    if isinstance(images, Mapping) and (given := pixels(images)) is not None:
        return expected(given) if len(images) == 1 else len(given)
    if isinstance(images, Mapping):
        return 1
    if isinstance(images, (Tensor, np.ndarray)):
        return len(images) if images.ndim > 3 else int(images.ndim > 1)
    if isinstance(images, Number):
        return 0
    if isinstance(images, (list, tuple)):
        parts = [expected(part) for part in images]
        return None if None in parts else sum(part for part in parts if part is not None)
    return len(images) if hasattr(images, "__getitem__") and hasattr(images, "__len__") else None
