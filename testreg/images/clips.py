"""Whatever holds clips, for models of videos -> clips one by one, and the frames that a model sees of one."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..runtime.errors import BadImages
from . import decode
from .sources import Clip, Item, Source, check, existing, is_open
from .takes import PIXELS, Takes

CLIP_COLUMNS = ("video", "videos", "clip", "frames", "mp4", "webm", "avi")  # what data sets call their clips


class Clips(Source):
    """An iterable of `Item` that are clips.

    What is given holds clips: a folder, in which every folder of pictures is a clip, its frames in the order of their
    numbers, and so is every video file; or an iterable of clips. A clip is such a folder or file, a list of frames, an
    array (frames, height, width, channels), or a tensor (frames, channels, height, width) of processed pixel values.
    """

    @property
    def expected(self) -> int | None:
        given = self.images
        if isinstance(given, (str, os.PathLike)) and os.path.isdir(path := os.path.expanduser(given)):
            return sum(1 for _ in self._folder(Path(path), holds=True))
        return len(given) if isinstance(given, (Tensor, np.ndarray)) and given.ndim == 5 else None

    def _items(self, value: Any, name: str) -> Iterator[Item]:
        whole = isinstance(value, (str, os.PathLike, bytes, Tensor, np.ndarray, Mapping)) or is_open(value)
        if isinstance(value, (str, os.PathLike)) and (path := existing(value)).is_dir():
            yield from self._folder(path, holds=True)
        elif isinstance(value, (Tensor, np.ndarray)) and value.ndim == 4:
            raise BadImages(
                f"{name} has the shape {tuple(value.shape)}, and {self.takes.wanted} For one clip pass {name}[None]."
            )
        elif whole:
            yield from self._clips(value, name)
        elif hasattr(value, "__iter__") or hasattr(value, "__getitem__"):
            for index, part in enumerate(self._parts(value)):
                yield from self._clips(part, f"{name}[{index}]")
        else:
            self._no_clip(value, name)

    def _clips(self, value: Any, name: str) -> Iterator[Item]:
        """The clips in `value`, which is one, or holds them."""
        if isinstance(value, (str, os.PathLike)):
            path = existing(value)
            if path.is_dir():
                yield from self._folder(path, holds=False)
            elif path.suffix.lower() in decode.VIDEOS:
                yield Item(str(path), Clip(path))
            else:
                self._no_clip(value, str(path))
        elif isinstance(value, (bytes, bytearray)):
            yield Item(name, Clip(bytes(value)))
        elif is_open(value):
            yield Item(name, Clip(self._read(value, name)))
        elif isinstance(value, (Number, np.generic)) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim < 2):
            self.ignored += 1  # a label
        elif isinstance(value, Tensor) and value.is_floating_point() and value.ndim in (4, 5):
            yield from self._processed({"pixel_values": value if value.ndim == 5 else value[None]}, name)
        elif isinstance(value, (Tensor, np.ndarray)) and value.ndim == 5:
            for index, clip in enumerate(value):
                yield self._frames(clip, f"{name}[{index}]")
        elif isinstance(value, (Tensor, np.ndarray)) and value.ndim == 4:
            yield self._frames(value, name)
        elif isinstance(value, Mapping) and any(key in value for key in PIXELS):
            yield from self._processed(value, name)
        elif isinstance(value, Mapping):
            yield from self._clips(_column(value, name), name)
        elif isinstance(value, (Image.Image, Tensor, np.ndarray)) or not (
            hasattr(value, "__iter__") or hasattr(value, "__getitem__")
        ):
            self._no_clip(value, name)
        else:
            parts = iter(self._parts(value))
            first = next(parts, None)
            if first is None:
                return
            if _is_frame(first):
                yield self._frames(chain([first], parts), name)
                return
            for index, part in enumerate(chain([first], parts)):
                yield from self._clips(part, f"{name}[{index}]")

    def _folder(self, folder: Path, *, holds: bool) -> Iterator[Item]:
        """The clips below a folder, which `holds` clips, or may be one itself."""
        frames: dict[Path, list[Path]] = {}
        for file, named in decode.files(folder):
            if named and holds and file.parent == folder:
                yield Item(str(file), f"a photo, where {self.takes.model} takes clips")
                self.hint = self.hint or f"There are photos, such as {file.name}, and {self.takes.wanted}"
            elif named:
                frames.setdefault(file.parent, []).append(file)
            elif file.suffix.lower() in decode.VIDEOS and not file.name.startswith("."):
                yield Item(str(file), Clip(file))
            else:
                self.ignored += 1
        for place, parts in frames.items():
            parts.sort(key=_in_order)
            yield Item(str(place), Clip(tuple(parts)))

    def _frames(self, frames: Any, name: str) -> Item:
        """A clip of frames in memory, or of files."""
        given = list(frames)
        made: list[Any] = []
        for index in spaced(len(given), self.takes.frames):
            frame, at = given[index], f"{name}[{index}]"
            if isinstance(frame, (str, os.PathLike)):
                made.append(existing(frame))
            elif isinstance(frame, (bytes, bytearray)):
                made.append(bytes(frame))
            elif is_open(frame):
                made.append(self._read(frame, at))
            elif isinstance(frame, Image.Image):
                try:
                    made.append(decode.upright(frame, self.takes.mode))
                except Exception as error:  # opened from a broken file, which is read only now
                    return Item(name, decode.reason(error))
            elif isinstance(frame, Tensor) and frame.is_floating_point():
                made.append(frame.detach().cpu())
            elif isinstance(frame, (Tensor, np.ndarray)):
                array = np.asarray(frame.cpu() if isinstance(frame, Tensor) else frame)
                made.append(decode.from_array(array, at, self.takes.mode))
            else:
                self._no_clip(frame, at)
        if made and all(isinstance(frame, Tensor) for frame in made):
            clip = {"pixel_values": torch.stack(made)[None]}  # (1, frames, channels, height, width)
            check(clip, name)
            return Item(name, clip)
        return Item(name, Clip(tuple(made)))

    def _no_clip(self, value: Any, name: str) -> None:
        kind = "photo" if _is_frame(value) else type(value).__name__
        raise BadImages(f"{name} is a {kind}, and {self.takes.wanted} One clip is a list of its frames.")


def read(clip: Clip, takes: Takes) -> list[Image.Image]:
    """The frames that a model sees of a clip: so many as it takes, evenly spaced.

    Raises:
        Exception: of nearly any type, as decoders do on broken files; `decode.reason` puts it in words.
    """
    if isinstance(clip.source, tuple):
        chosen = [clip.source[index] for index in spaced(len(clip.source), takes.frames)]
        frames = [
            decode.upright(frame, takes.mode) if isinstance(frame, Image.Image) else decode.decode(frame, takes.mode)
            for frame in chosen
        ]
    else:
        frames = _decoded(clip.source, takes)
    if not frames or (takes.exact and len(frames) != takes.frames):
        raise ValueError(f"a clip of {len(frames)} frames, where {takes.model} takes {takes.frames}")
    if len(sizes := {frame.size for frame in frames}) > 1:
        raise ValueError(f"a clip has frames of one size, and these have {len(sizes)}: are they photos?")
    return frames


def spaced(total: int, wanted: int | None) -> list[int]:
    """Which of `total` frames a model sees that takes `wanted`; all where there are not more."""
    if wanted is None or total <= wanted:
        return list(range(total))
    return [index * total // wanted for index in range(wanted)]


def digest(frames: list[Image.Image]) -> str:
    """SHA-256 in hexadecimal of the digests of the frames."""
    return hashlib.sha256(" ".join(["clip", *map(decode.digest, frames)]).encode()).hexdigest()


def _decoded(source: Path | bytes, takes: Takes) -> list[Image.Image]:
    try:
        import av
    except ImportError as error:
        raise OSError("a video file, which PyAV reads: pip install testreg[video]") from error
    from transformers.video_utils import read_video_pyav

    def opened() -> Any:
        return str(source) if isinstance(source, Path) else io.BytesIO(source)

    def indices(metadata: Any, **_: Any) -> list[int]:
        total = metadata.total_num_frames
        if not total:  # some containers do not say
            with av.open(opened()) as container:
                total = sum(1 for _ in container.decode(video=0))
        return spaced(total, takes.frames)

    array, _ = read_video_pyav(opened(), indices)  # (frames, height, width, 3)
    return [decode.upright(Image.fromarray(frame), takes.mode) for frame in array]


def _is_frame(value: Any) -> bool:
    if isinstance(value, (str, os.PathLike)):
        return not (os.path.isdir(os.path.expanduser(value)) or Path(value).suffix.lower() in decode.VIDEOS)
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim in (2, 3)
    return isinstance(value, (Image.Image, bytes, bytearray)) or is_open(value)


def _in_order(path: Path) -> list[Any]:
    """Frame 10 comes after frame 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _column(row: Mapping[str, Any], name: str) -> Any:
    """The clip in a row of a data set."""
    if set(row) == {"bytes", "path"}:
        return row["path"] if row["bytes"] is None else row["bytes"]
    found = [row[key] for key in CLIP_COLUMNS if key in row]
    if len(found) != 1:
        raise BadImages(
            f"{name} is a dict with the keys {', '.join(map(repr, row))}; exactly one of {', '.join(PIXELS)}, "
            f'{", ".join(CLIP_COLUMNS)} is needed. Pass the clips alone, as in (row["clip"] for row in images).'
        )
    return found[0]
