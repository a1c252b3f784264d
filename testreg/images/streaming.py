"""Whatever holds images -> batches of model inputs, through the model's own image processor.

Streaming: one image at a time is read, decoded and processed, so memory does not grow with their number. Files may be
broken: they are skipped and listed with a reason. Values handed over in memory may not be: they raise.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..runtime.errors import BadImages, ImagesDark, ImagesSkipped
from . import clips, decode, processors, sources
from .takes import Takes, taken_by


@dataclass(frozen=True)
class Batch:
    """Images, or clips, of one processed shape.

    Attributes:
        inputs: what the model is called with, on the CPU; every tensor has the axis of images first, as in
            `pixel_values (images, channels, height, width)`, or `(clips, frames, channels, height, width)`, or
            `(images, patches, ...)` where a tower takes the patches of all images as one sequence.
        digests: one per image, SHA-256 in hexadecimal of its mode, its size and its upright pixels (of the tensors,
            where the image came processed): the same image has the same digest in any file format, order, batch or run.
            Of a clip, that of the frames that the model sees.
    """

    inputs: dict[str, Tensor]
    digests: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.digests)


def stream(
    images: Any,
    processor: Callable[..., Any] | str | os.PathLike[str] | None = None,
    *,
    model: Any = None,
    batch_size: int = 16,
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
) -> ImageStream:
    """Batches of `images`, made when they are iterated over.

    Args:
        images: a folder (searched recursively, in the order of names; hidden files and those without the suffix of an
            image are passed over), a file, one that is open, encoded bytes, a PIL image, an array (height, width),
            (height, width, channels) or, where only the first axis can be channels, (channels, height, width), of bool,
            uint8, uint16 or floats in 0..1, or several of one size in one array; a uint8 tensor of such shapes; a
            floating-point tensor of processed pixel values (channels, height, width) or (images, channels, height,
            width); a dict of processed inputs with an axis of images; a row of a data set with one image; or an
            iterable of any of these, nested or not (list, generator, data set, DataLoader). Numbers and 0-d or 1-d
            arrays beside the images are labels and passed over. For a model of videos, whatever holds clips: see
            `testreg.images.clips`.
        processor: turns an image into inputs: an image processor of transformers, a full Processor that has one, a
            function from a PIL image to a tensor (channels, height, width), such as timm's and open_clip's transforms,
            or the name of one: see `testreg.images.processors.named`.
        model: whose own processor to use where none is given (see `testreg.images.processors`), and which says how many
            channels an image has, and whether clips are needed.
        batch_size: images per batch, at least 1; fewer at the end, and where images come in several shapes.
        workers: processes that decode and process; 0 = this one. The batches are the same.
        share: which of how many shares, from 0: batches of the images are dealt out in turn, all of them read by their
            own share only, as far as they are files. A share may be empty.

    Every image becomes upright (EXIF rotation applied) 8-bit RGB, or gray for a model of one channel, before it is
    processed: transparent pixels show white, 16-bit values are scaled, of animations the first frame counts.

    Raises:
        BadImages: a path does not exist, an argument is out of range, or `processor` is none; the rest is raised by the
            iteration.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise BadImages(f"{name} must be a whole number from {least}, not {value!r}.")
    for path in images if isinstance(images, (list, tuple)) else [images]:
        if isinstance(path, (str, os.PathLike)):
            sources.existing(path)  # a typo costs nothing here, and much at the end of a long run
    wanted, missing = taken_by(model), ""
    found: Callable[..., Any] | None = None
    try:
        found = processors.chosen(processor, model, wanted)
    except BadImages as error:
        if processor is not None:
            raise
        missing = str(error)  # which matters only if an image turns up that needs a processor
    return ImageStream(images, found, batch_size, workers, missing, share, wanted)


def pictures(images: Any, most: int) -> Iterator[tuple[str, Image.Image]]:
    """Digests as those of `Batch`, and upright RGB pictures, of the first images that are whole files or pictures."""
    for item in sources.Source(images):
        if most <= 0:
            return
        if not isinstance(item.value, (os.PathLike, bytes, Image.Image)):
            continue
        try:
            picture = item.value if isinstance(item.value, Image.Image) else decode.decode(item.value)
        except Exception:  # broken: whoever streams the images says so
            continue
        yield decode.digest(picture), picture
        most -= 1


class ImageStream:
    """An iterable of `Batch`; see `stream`. It can be iterated over again where the images can.

    Attributes:
        skipped: `(name, reason)` of the broken images that the last iteration met.
        dark: names of images that are nearly only black, of those that it yielded.
        count: images that the last iteration yielded so far.

    Iterating raises BadImages where no image is left, a value in memory is no image or not finite, an image needs a
    processor and there is none, or an iterator among the images was used up by an earlier iteration.
    """

    def __init__(
        self,
        images: Any,
        processor: Callable[..., Any] | None,
        batch_size: int,
        workers: int,
        missing: str = "",
        share: tuple[int, int] = (0, 1),
        takes: Takes = Takes(),  # noqa: B008, it is frozen
    ):
        self.source = (sources.Source if takes.frames is None else clips.Clips)(images, takes)
        self.processor, self.batch_size, self.workers = processor, batch_size, workers
        self.skipped: list[tuple[str, str]] = []
        self.dark: list[str] = []
        self.count = 0
        self._missing = missing
        self._share, self._shares = share

    @property
    def ignored(self) -> int:
        """Files that are hidden or not named like images, and labels, that the last iteration passed over."""
        return self.source.ignored

    @property
    def expected(self) -> int | None:
        """How many images there are, broken ones included; None where only the iteration can tell."""
        return self.source.expected

    def __iter__(self) -> Iterator[Batch]:
        self.skipped, self.dark, self.count = [], [], 0
        groups: dict[Any, list[_Prepared]] = {}  # processors that keep the aspect ratio give several shapes
        for image in self._prepared():
            if image.inputs is None:
                self.skipped.append((image.name, image.text))
                continue
            self.source.takes.check(image.inputs, image.name)
            self.dark += [image.name] * image.dark
            shape = tuple((key, value.shape, value.dtype) for key, value in image.inputs.items())
            groups.setdefault(shape, []).append(image)
            if len(groups[shape]) == self.batch_size:
                yield self._batch(groups.pop(shape))
            elif sum(map(len, groups.values())) == 2 * self.batch_size:  # never more than two batches wait
                fullest = max(groups, key=lambda shape: len(groups[shape]))
                yield self._batch(groups.pop(fullest))
        for group in groups.values():
            yield self._batch(group)
        if not self.count and self._shares == 1:
            raise BadImages(self.nothing())

    def _prepared(self) -> Iterator[_Prepared]:
        # What a sampler yields goes to dataset[...] in a worker, in order: so the sampler yields the images themselves,
        # and a generator is read once, here, however many workers there are.
        loader: Iterable[_Prepared] = DataLoader(
            _Prepare(self.processor, self.source.takes),
            sampler=self._items(),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=-(-2 * self.batch_size // self.workers) if self.workers else None,  # two batches in all
            collate_fn=_same,
            generator=torch.Generator(),  # or it would draw from the user's
        )
        for image in loader:
            if self.workers and image.inputs:  # each tensor from a worker holds a file open, of which there are few
                image = image._replace(inputs={key: value.clone() for key, value in image.inputs.items()})
            yield image

    def _items(self) -> Iterator[sources.Item]:
        for index, item in enumerate(self.source):
            if index // self.batch_size % self._shares != self._share:
                continue  # whole batches, so that every image has the neighbours that it has with one share
            if self.processor is None and not isinstance(item.value, (dict, str)):
                raise BadImages(f"{item.name} needs an image processor, and there is none that fits: {self._missing}")
            yield item

    def _batch(self, group: list[_Prepared]) -> Batch:
        self.count += len(group)
        rows = [image.inputs for image in group if image.inputs is not None]
        inputs = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}  # (1, ...) x images -> (images, ...)
        return Batch(inputs, tuple(image.text for image in group))

    def warn(self) -> None:
        """Warn of images that the last iteration skipped, and of those that are nearly only black."""
        if self.skipped:
            rest = {reason: (name, reason) for name, reason in reversed(self.skipped)}  # one of each reason, the first
            shown = list(dict.fromkeys([*reversed(rest.values()), *self.skipped]))[:3]
            reasons = "; ".join(f"{name}: {reason}" for name, reason in shown) + "; ..." * (len(self.skipped) > 3)
            others = f", and {self.ignored} of other kinds" if self.ignored else ""
            files = len(self.skipped) + self.count
            message = f"skipped {len(self.skipped)} of {files} image files{others}: {reasons}"
            warnings.warn(message, ImagesSkipped, stacklevel=3)
        if self.dark:
            named = ", ".join(self.dark[:3]) + ", ..." * (len(self.dark) > 3)
            message = (
                f"{len(self.dark)} of {self.count} images are nearly only black ({named}): no value is above "
                f"{decode.DARK} of 255, as in pictures of 12 bits that are stored in 16. If they are, give them with "
                f"their values times 16, or the model sees next to nothing"
            )
            warnings.warn(message, ImagesDark, stacklevel=3)

    def nothing(self) -> str:
        """Why there is no image among those given."""
        images = self.source.images
        given = images if isinstance(images, (str, os.PathLike)) else f"the {type(images).__name__} given"
        broken = "; ".join(f"{name}: {reason}" for name, reason in self.skipped[:3])
        return (
            f"no image could be used of {given}: {len(self.skipped)} broken"
            + (f" ({broken}{'; ...' if len(self.skipped) > 3 else ''})" if broken else "")
            + f", {self.ignored} passed over (hidden, not named like an image, or a label). "
            + (self.source.hint or sources.EXPECTED)
        )


class _Prepared(NamedTuple):
    name: str
    inputs: dict[str, Tensor] | None  # None where the image is broken
    text: str  # its digest, or the reason
    dark: bool = False  # nearly only black


class _Prepare(Dataset[_Prepared]):
    """Decodes and processes one image; runs in the workers."""

    def __init__(self, processor: Callable[..., Any] | None, takes: Takes):
        self.processor, self.takes = processor, takes

    def __getitem__(self, item: sources.Item) -> _Prepared:
        value = item.value
        try:
            if isinstance(value, str):
                return _Prepared(item.name, None, value)
            if isinstance(value, dict):
                return _Prepared(item.name, value, _digest(value))
            if isinstance(value, sources.Clip):
                frames = clips.read(value, self.takes)
                return _Prepared(item.name, self._process(frames), clips.digest(frames), all(map(decode.dark, frames)))
            image = value if isinstance(value, Image.Image) else decode.decode(value, self.takes.mode)
            return _Prepared(item.name, self._process(image), decode.digest(image), decode.dark(image))
        except Exception as error:  # Pillow's decoders raise nearly every type there is on broken files
            return _Prepared(item.name, None, decode.reason(error))

    def _process(self, picture: Image.Image | list[Image.Image]) -> dict[str, Tensor]:
        assert self.processor is not None
        # One image at a time: what it becomes, and whether it can be processed, does not depend on its neighbours.
        images = sources.apart(processors.call(self.processor, picture, self.takes))
        if len(images) != 1 or sources.check(images[0], "what the processor makes of it") != 1:
            raise ValueError("the processor makes several images of it")
        return images[0]


def _digest(inputs: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for key, value in sorted(inputs.items()):
        total.update(f"{key} {value.dtype} {tuple(value.shape)} ".encode())
        total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _same(value: Any) -> Any:
    return value  # a lambda could not travel to the workers
