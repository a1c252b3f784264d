"""Labelled photos as data sets keep them: COCO JSON, VOC XML, masks beside photos, one folder per class."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from ..runtime.errors import BadImages
from .decode import files

IGNORE = 255  # the mask value that counts as no class at all
CLASSES = ("mask_classes.json", "classes.json", "classes.txt")  # what mask values are called
NO_CLASS = ("unlabeled", "unlabelled", "void", "ignore")
DEPTHS = "depths"
MASKS = ("masks", "SegmentationClass", "SegmentationObject", DEPTHS)  # folders whose images are no photos


@dataclass(frozen=True)
class Sample:
    """One photo and what is known about it.

    Attributes:
        boxes: of its objects, `(objects, 4)`: left, top, right, bottom in pixels, right and bottom not included.
        mask: file whose pixel values are class indices, `IGNORE` for none.
        label: name of its class.
        depth: file whose pixel values are millimetres, 0 for none.
    """

    path: Path
    boxes: Tensor = field(default_factory=lambda: torch.zeros(0, 4))
    mask: Path | None = None
    label: str | None = None
    depth: Path | None = None

    def size(self) -> tuple[int, int]:
        """Width and height in pixels, upright, read from the head of the file.

        Raises:
            BadImages: the file cannot be read.
        """
        try:
            with Image.open(self.path) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4  # on its side
                return image.size[::-1] if turned else image.size
        except Exception as error:  # Pillow's decoders raise nearly every type there is on broken files
            raise BadImages(f"the photo {self.path} cannot be read: {error}") from error

    def read_mask(self) -> Tensor:
        """The mask as `(height, width)` of class indices.

        Raises:
            BadImages: the file cannot be read, or does not hold one number per pixel.
        """
        values = _pixels(f"the mask {self.mask}", self.mask)
        if values.ndim != 2 or values.dtype.kind not in "ub":
            raise BadImages(
                f"the mask {self.mask} is of the shape {values.shape} and type {values.dtype}; "
                f"one class index per pixel is needed, as in a grayscale or palette PNG."
            )
        return torch.from_numpy(values.astype(np.int64))

    def read_depth(self) -> Tensor:
        """The depth as `(height, width)` in metres, 0 where it is not known.

        Raises:
            BadImages: the file cannot be read, does not hold millimetres in 16 bits, or knows no depth at all.
        """
        values = _pixels(f"the depth map {self.depth}", self.depth)
        if values.ndim != 2 or values.dtype.kind not in "ui" or values.dtype.itemsize < 2:
            raise BadImages(
                f"the depth map {self.depth} is of the shape {values.shape} and type {values.dtype}; one depth per "
                f"pixel in millimetres is needed, 0 where it is not known, as in a grayscale PNG of 16 bits."
            )
        if not (values > 0).any():
            raise BadImages(f"the depth map {self.depth} knows no depth: all of its pixels are 0. Leave it out.")
        return torch.from_numpy(values.astype(np.float32) / 1000)


def photos(data: str | Path) -> list[Sample]:
    """All photos below a folder, without labels."""
    return [Sample(path) for path in _photos(_folder(data))]


def boxed(data: str | Path) -> list[Sample]:
    """Photos with boxes below a folder: from a COCO JSON file in it, or from VOC XML files. Those without are left out.

    Crowds of COCO are left out, as the protocols of object discovery do; VOC's difficult objects count.

    Raises:
        BadImages: there are no annotations, they cannot be read, or a photo that they name is missing.
    """
    folder = _folder(data)
    found = {path.name: path for path in _photos(folder)}
    for path in sorted(folder.rglob("*.json")):
        annotations = _json(path)
        if isinstance(annotations, dict) and {"images", "annotations"} <= annotations.keys():
            return _some(sorted(_coco(annotations, path, found), key=lambda sample: sample.path), path)
    xmls = sorted(folder.rglob("*.xml"))
    if xmls:
        return _some([sample for path in xmls if (sample := _voc(path, found)) is not None], folder)
    raise BadImages(
        f"{folder} holds no boxes: a COCO JSON file with images and annotations, or VOC XML files, is needed."
    )


def masked(data: str | Path) -> list[Sample]:
    """Photos with a mask below a folder: a PNG file of the same name below a folder `masks` or `SegmentationClass`.

    Raises:
        BadImages: no photo has one, or which of several cannot be told.
    """
    folder = _folder(data)
    samples = [Sample(path, mask=mask) for path, mask in _paired(folder, MASKS[:2])]
    return _some(samples, folder, "a folder masks/ with a PNG of class indices for each photo, of the same name")


def deep(data: str | Path) -> list[Sample]:
    """Photos with a depth map below a folder: a PNG file of the same name below a folder `depths`.

    Raises:
        BadImages: no photo has one, or which of several cannot be told.
    """
    folder = _folder(data)
    samples = [Sample(path, depth=depth) for path, depth in _paired(folder, (DEPTHS,))]
    return _some(samples, folder, "a folder depths/ with a PNG of millimetres for each photo, of the same name")


def named_classes(data: str | Path) -> dict[int, str]:
    """Mask value -> name of its class, from a file in the folder: `mask_classes.json` or `classes.json`, which map one
    to the other, or `classes.txt`, a name per line, from 0 on. "unlabeled", "void" and "ignore" are no classes, nor is
    `IGNORE`; several names of one class are parted by commas.

    Raises:
        BadImages: there is none, or it holds something else.
    """
    folder = _folder(data)
    path = next((folder / name for name in CLASSES if (folder / name).is_file()), None)
    if path is None:
        raise BadImages(f"{folder} does not say what its mask values are called: {' or '.join(CLASSES)} is needed.")
    if path.suffix == ".txt":
        named: Any = dict(enumerate(path.read_text(encoding="utf-8").splitlines()))
    else:
        named = _json(path)
    try:
        found = {int(value): str(name).strip() for value, name in named.items()}
    except (AttributeError, ValueError) as error:
        raise BadImages(f'{path} must map mask values to names, as in {{"1": "person"}}: {error}.') from error
    return {value: name for value, name in found.items() if name and name.lower() not in NO_CLASS and value != IGNORE}


def labelled(data: str | Path) -> list[Sample]:
    """Photos in one folder per class, as torchvision's ImageFolder has them.

    Raises:
        BadImages: there are fewer than two such folders.
    """
    folder = _folder(data)
    samples = [
        Sample(path, label=part.name) for part in sorted(folder.iterdir()) if part.is_dir() for path in _photos(part)
    ]
    if len({sample.label for sample in samples}) < 2:
        raise BadImages(f"{folder} needs one folder of photos per class, at least two, as in {folder}/cat/1.jpg.")
    return samples


def _coco(annotations: Any, path: Path, found: dict[str, Path]) -> list[Sample]:
    try:
        samples = {image["id"]: Sample(_photo(str(image["file_name"]), path, found)) for image in annotations["images"]}
        for row in annotations["annotations"]:
            sample = samples.get(row["image_id"])
            if sample is None or row.get("iscrowd"):
                continue
            left, top, width, height = (float(value) for value in row["bbox"])
            box = _box(left, top, left + width, top + height)
            samples[row["image_id"]] = replace(sample, boxes=torch.cat([sample.boxes, box[None]]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadImages(f"{path} is no COCO annotation file: {type(error).__name__} {error}") from error
    return [sample for sample in samples.values() if len(sample.boxes)]


def _voc(path: Path, found: dict[str, Path]) -> Sample | None:
    try:
        root = ElementTree.parse(path).getroot()
        corners = [
            [float(box.findtext(name) or "") for name in ("xmin", "ymin", "xmax", "ymax")]
            for box in root.findall("object/bndbox")
        ]
        boxes = [_box(left - 1, top - 1, right, bottom) for left, top, right, bottom in corners]  # counted from 1
    except (ElementTree.ParseError, ValueError) as error:
        raise BadImages(f"{path} is no VOC annotation file: {error}") from error
    name = root.findtext("filename") or f"{path.stem}.jpg"
    return Sample(_photo(name, path, found), boxes=torch.stack(boxes)) if boxes else None


def _box(left: float, top: float, right: float, bottom: float) -> Tensor:
    if not all(map(math.isfinite, (left, top, right, bottom))) or right < left or bottom < top:
        raise ValueError(f"the box {(left, top, right, bottom)} has no extent")
    return torch.tensor([left, top, right, bottom])


def _photo(name: str, source: Path, found: dict[str, Path]) -> Path:
    path = found.get(name.replace("\\", "/").split("/")[-1])
    if path is None:
        raise BadImages(f"{source} names the photo {name!r}, which is not below {source.parent}.")
    return path


def _pixels(what: str, file: Path | None) -> Any:
    """The values of a labels' image, `(height, width)` or with channels behind."""
    try:
        with Image.open(str(file)) as image:
            return np.array(image)
    except Exception as error:  # Pillow's decoders raise nearly every type there is on broken files
        raise BadImages(f"{what} cannot be read: {error}") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadImages(f"{path} cannot be read as JSON: {error}") from error


def _folder(data: str | Path) -> Path:
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise BadImages(f"there is no folder {folder}: a folder with photos and their labels is needed.")
    return folder


def _paired(folder: Path, names: tuple[str, ...]) -> list[tuple[Path, Path]]:
    """Photos, each with the PNG file below a folder called one of `names` that has its path, or else its name.

    Raises:
        BadImages: a name is that of several files, and none has the photo's path.
    """
    labels: dict[tuple[str, ...], Path] = {}  # by their path without that folder
    for name in names:
        for path in sorted(folder.rglob(f"{name}/**/*.png")):
            place = path.relative_to(folder).with_suffix("").parts
            labels[tuple(part for part in place if part != name)] = path
    photos = {path: path.relative_to(folder).with_suffix("").parts for path in _photos(folder)}
    taken: dict[Path, Path] = {}  # label -> photo
    for photo, place in photos.items():
        ends = [place[start:] for start in range(len(place) - 1 if len(place) > 1 else 1)]
        if (end := next((end for end in ends if end in labels), None)) is not None:
            taken.setdefault(labels[end], photo)
    paired = {photo: label for label, photo in taken.items()}
    left: dict[str, list[Path]] = {}
    for place, path in labels.items():
        if path not in taken:
            left.setdefault(place[-1], []).append(path)
    for photo in [photo for photo in photos if photo not in paired and photo.stem in left]:
        several = left[photo.stem]
        if len(several) > 1:
            raise BadImages(f"{photo} may go with {several[0]} or {several[1]}: give both the folders of the photos.")
        paired[photo] = several[0]
    return [(photo, paired[photo]) for photo in photos if photo in paired]


def _photos(folder: Path) -> Iterator[Path]:
    return (path for path, named in files(folder) if named and set(MASKS).isdisjoint(path.relative_to(folder).parts))


def _some(samples: list[Sample], source: Path, needed: str = "boxes of objects that are no crowds") -> list[Sample]:
    if not samples:
        raise BadImages(f"no photo of {source} has labels of the kind asked for: {needed}.")
    return samples
