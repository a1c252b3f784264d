"""Files, encoded bytes, PIL images and arrays -> upright 8-bit RGB pictures, or an error that says why not."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ..runtime.errors import BadImages

# Formats of pictures only: others that Pillow knows start programs (EPS) or take almost any bytes for an image (TGA).
# HEIF and JXL count where a Pillow plugin provides them.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "HEIF", "JXL")
CHANNELS = (1, 3, 4)  # gray, RGB, RGB and opacity


def decode(source: Path | bytes) -> Image.Image:
    """The picture in a file, or in bytes of the same form.

    Raises:
        Exception: of nearly any type, as Pillow's decoders do on broken files; `reason` puts it in words.
    """
    if isinstance(source, Path) and not source.is_file():
        raise OSError("not a regular file")  # a pipe would block for ever
    if not (source.stat().st_size if isinstance(source, Path) else len(source)):
        raise OSError("the file is empty")
    Image.init()  # or formats of plugins are missing
    formats = [name for name in FORMATS if name in Image.OPEN]
    with strict(), Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=formats) as image:
        return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """`image` as 8-bit RGB: EXIF rotation applied, 16 bits scaled to 8, transparency shown on white, the first frame.

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
    image = image.convert("RGB")
    image.info = {}  # nothing but pixels travels to other processes
    return image


def from_array(array: np.ndarray, name: str) -> Image.Image:
    """An array (height, width), (height, width, channels), or (channels, height, width) where the last axis cannot be
    channels; of bool, uint8, uint16 or floats in 0..1.

    Raises:
        BadImages: of another shape or range, or with NaN; `name` says which.
    """
    if array.ndim == 3 and array.shape[-1] not in CHANNELS and array.shape[0] in CHANNELS:
        array = np.moveaxis(array, 0, -1)  # (channels, height, width) -> (height, width, channels)
    if not array.size or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in CHANNELS)):
        raise BadImages(
            f"{name} has the shape {array.shape}; an image is (height, width) or (height, width, channels) with 1, 3 "
            f"or 4 channels. For processed pixel values pass a torch tensor (images, channels, height, width)."
        )
    try:
        return upright_rgb(_picture(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array))
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
    """SHA-256 in hexadecimal of the size and the pixels of an RGB picture."""
    return hashlib.sha256(f"RGB {image.width}x{image.height} ".encode() + image.tobytes()).hexdigest()


def files(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[tuple[Path, bool]]:
    """All files below `folder` in the order of their names, each with whether it is named like an image and not hidden.

    Hidden folders are named, but not entered. Links are followed, except back to a folder that is being searched.

    Raises:
        BadImages: a folder cannot be read.
    """
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
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


def reason(error: Exception) -> str:
    """Why something cannot be read, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a format that Pillow reads here"
    line = (str(error).strip().splitlines() or [""])[0][:300]
    return line if " " in line else f"{type(error).__name__} {line}".strip()
