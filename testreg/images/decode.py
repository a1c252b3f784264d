"""Files, encoded bytes, PIL images and arrays -> upright 8-bit pictures, RGB or gray, or an error that says why not."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ..runtime.errors import BadImages

# Formats of pictures only: others that Pillow knows start programs (EPS) or take almost any bytes for an image (TGA).
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "HEIF", "JXL")
CHANNELS = (1, 3, 4)  # gray, RGB, RGB and opacity
DARK = 16  # of 255: no pixel of 12 bits that are stored in 16 is brighter

# Formats that Pillow reads with a plugin, where it is installed: what to import, and how to install it.
PLUGINS = {
    "HEIF": ("pillow_heif", "pip install testreg[heif]"),
    "AVIF": ("pillow_avif", "pip install -U pillow"),
    "JXL": ("pillow_jxl", "pip install pillow-jxl-plugin"),
}
RAW = "a camera's raw file, which has to be developed: give a JPEG, PNG or TIFF of it"
MEDICAL = "a medical image without a known range: give a PNG or TIFF of it, of 8 or 16 bits"
# Suffixes of pictures that no plugin here reads, and of the plugins' own where these are missing.
UNREAD: dict[str, str] = {
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".rw2", ".orf"), RAW),
    **dict.fromkeys((".dcm", ".dicom", ".nii", ".nrrd", ".mha"), MEDICAL),
    **{
        suffix: f"{name}, which is not read here: {PLUGINS[name][1]}"
        for name, suffixes in {"HEIF": (".heic", ".heif", ".hif"), "AVIF": (".avif",), "JXL": (".jxl",)}.items()
        for suffix in suffixes
    },
}
VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".wmv", ".ogv")


@cache
def formats() -> tuple[str, ...]:
    """The formats that can be read here, those of plugins among them, which register as they are imported."""
    Image.init()
    for name, (module, _) in PLUGINS.items():
        if name not in Image.OPEN:
            with suppress(ImportError):
                getattr(import_module(module), "register_heif_opener", bool)()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode(source: Path | bytes, mode: str = "RGB") -> Image.Image:
    """The picture in a file, or in bytes of the same form.

    Raises:
        Exception: of nearly any type, as Pillow's decoders do on broken files; `reason` puts it in words.
    """
    if isinstance(source, Path) and not source.is_file():
        raise OSError("not a regular file")  # a pipe would block for ever
    if not (source.stat().st_size if isinstance(source, Path) else len(source)):
        raise OSError("the file is empty")
    if isinstance(source, Path) and source.suffix.lower() not in _suffixes():
        if reason := UNREAD.get(source.suffix.lower()):
            raise OSError(reason)
        if source.suffix.lower() in VIDEOS:
            raise OSError("a video, where images are needed: give frames of it")
    opened = source if isinstance(source, Path) else io.BytesIO(source)
    with strict(), Image.open(opened, formats=formats()) as image:
        return upright(image, mode)


def upright(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """`image` in 8 bits, RGB or gray: EXIF rotation applied, 16 bits scaled, transparency on white, the first frame.

    Raises:
        Exception: the image is opened from a broken file, or its values have no known range.
    """
    with strict():
        image.load()
    coded = image.format
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" and coded in ("PNG", "PPM"):  # 16 bits in a wider mode
        image = _picture(np.asarray(image).astype(np.uint16))
    elif image.mode.startswith(("I", "F")):
        image = _picture(np.asarray(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(mode)
    image.info = {}  # nothing but pixels travels to other processes
    return image


def from_array(array: np.ndarray, name: str, mode: str = "RGB") -> Image.Image:
    """An array (height, width), (height, width, channels), or (channels, height, width) where the last axis cannot be
    channels; of bool, uint8, uint16 or floats in 0..1.

    Raises:
        BadImages: of another shape or range, or with NaN; `name` says which.
    """
    if array.ndim == 3 and array.shape[-1] not in CHANNELS and array.shape[0] in CHANNELS:
        array = np.moveaxis(array, 0, -1)  # (channels, height, width) -> (height, width, channels)
    if not array.size or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in CHANNELS)):
        clips = " Clips (clips, frames, height, width, channels) are for models of videos." if array.ndim == 5 else ""
        raise BadImages(
            f"{name} has the shape {array.shape}; an image is (height, width) or (height, width, channels) with 1, 3 "
            f"or 4 channels. For processed pixel values pass a torch tensor (images, channels, height, width).{clips}"
        )
    try:
        return upright(_picture(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array), mode)
    except ValueError as error:
        raise BadImages(f"{name} {error}") from error


def _picture(array: np.ndarray) -> Image.Image:
    """(height, width) or (height, width, channels), scaled to 8 bits."""
    if array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype == np.uint16 or array.dtype.str == ">u2":
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 -> 255, rounded
    elif array.dtype.kind == "f" and array.min() >= 0 and array.max() <= 1:  # false for NaN too
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(
            f"holds {array.dtype} from {array.min()} to {array.max()}; images of uint8, uint16 or floats from 0 to 1 "
            f"have a known range: scale it to one of these."
        )
    return Image.fromarray(np.ascontiguousarray(array))


@contextmanager
def strict() -> Iterator[None]:
    """Pictures that are cut short, and decompression bombs by Pillow's own limit, are errors inside the `with`."""
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False  # training scripts often set it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def digest(image: Image.Image) -> str:
    """SHA-256 in hexadecimal of the mode, the size and the pixels of a picture."""
    return hashlib.sha256(f"{image.mode} {image.width}x{image.height} ".encode() + image.tobytes()).hexdigest()


def dark(image: Image.Image) -> bool:
    """Whether an 8-bit picture is nearly only black."""
    extrema: Any = image.getextrema()  # (low, high), or such a pair per channel
    return bool(np.max(extrema) <= DARK)


def files(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[tuple[Path, bool]]:
    """All files below `folder` in the order of their names, each with whether it is named like an image and not hidden.

    Hidden folders are named, but not entered. Links are followed, except back to a folder that is being searched.

    Raises:
        BadImages: a folder cannot be read.
    """
    suffixes = _suffixes() | UNREAD.keys()  # what cannot be read here is told by `decode`, not passed over
    real = folder.resolve()
    try:
        entries = sorted(folder.iterdir()) if real not in above else []
    except OSError as error:
        raise BadImages(f"the folder {folder} cannot be read: {error}") from error
    for entry in entries:
        hidden = entry.name.startswith(".")
        if entry.is_dir() and not hidden:
            yield from files(entry, above | {real})
        else:
            yield entry, entry.suffix.lower() in suffixes and not hidden


@cache
def _suffixes() -> frozenset[str]:
    known = formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def reason(error: Exception) -> str:
    """Why something cannot be read, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a format that Pillow reads here"
    line = (str(error).strip().splitlines() or [""])[0][:300]
    return line if " " in line else f"{type(error).__name__} {line}".strip()
