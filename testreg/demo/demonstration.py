"""What the demonstration needs, made or found on the spot: a small ViT with planted register neurons, real photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from ..runtime.errors import BadCheckpoint, BadImages
from .planted import Planted, plant

SIZE = 224
PHOTOS = (
    "astronaut", "cat", "coffee", "rocket", "immunohistochemistry", "hubble_deep_field", "retina", "camera", "coins",
    "moon", "grass", "gravel", "brick",
)  # fmt: skip


@torch.no_grad()
def demo_model(seed: int = 0) -> tuple[ViTForImageClassification, Planted]:
    """A small random ViT for 224 px images with planted register neurons, and what was planted.

    Its head names the photo that a crop comes from: the nearest of the photos' mean class-token features.

    Raises:
        BadImages: scikit-image is not installed.
    """
    config = ViTConfig(
        image_size=SIZE,
        hidden_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=256,
        id2label=dict(enumerate(PHOTOS)),
        label2id={name: index for index, name in enumerate(PHOTOS)},
    )
    model = ViTForImageClassification(config).eval()
    planted = plant(model, seed=seed, neurons=2, upstream=2)
    crops = demo_photos(16 * len(PHOTOS), seed=seed + 1_000_000)  # other crops than a demonstration with a small seed
    features = model.vit(_pixels(crops, SIZE)).last_hidden_state[:, 0]  # (crops, channels)
    centres = features.unflatten(0, (-1, len(PHOTOS))).mean(0)  # (photos, channels)
    centred = centres - centres.mean(0)
    model.classifier.weight.copy_(centred)
    model.classifier.bias.copy_(-(centres.mean(0) + centred / 2).mul(centred).sum(1))
    return model, planted


def demo_photos(count: int, seed: int = 0) -> list[Image.Image]:
    """Square RGB crops of the real photos that come with scikit-image, all different; crop i is of photo i modulo 13.

    Raises:
        BadImages: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise BadImages(
            "the demonstration's photos come with scikit-image, which is not installed: pip install 'testreg[demo]'"
        ) from error
    photos = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in PHOTOS]
    random = np.random.default_rng(seed)
    crops = []
    for index in range(count):
        photo = photos[index % len(photos)]
        side = int(min(photo.size) * random.uniform(0.4, 0.9))
        left, top = (int(random.integers(0, length - side + 1)) for length in photo.size)
        crops.append(photo.crop((left, top, left + side, top + side)))
    return crops


def write(directory: Path, *, replace: bool = False) -> tuple[Path, Path]:
    """The demonstration's checkpoint, with its image processor, and photos, in a directory.

    Args:
        replace: use a directory that holds an earlier demonstration.

    Returns:
        The checkpoint's directory and that of the photos.

    Raises:
        BadCheckpoint: the directory is in use, and `replace` is not given, or cannot be written.
        BadImages: scikit-image is not installed.
    """
    checkpoint, photos = directory / "planted-vit", directory / "photos"
    try:
        if directory.exists() and any(directory.iterdir()) and not (replace and checkpoint.is_dir()):
            raise BadCheckpoint(f"{directory} is not empty: choose another directory with --out, or pass --replace.")
        photos.mkdir(parents=True, exist_ok=True)
        for index, photo in enumerate(demo_photos(64)):
            photo.save(photos / f"{index:02d}-{PHOTOS[index % len(PHOTOS)]}.jpg", quality=95)
        demo_model()[0].save_pretrained(checkpoint)
        ViTImageProcessor(do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(checkpoint)
    except OSError as error:
        raise BadCheckpoint(f"{directory} cannot be written: {error}.") from error
    return checkpoint, photos


def _pixels(images: list[Image.Image], size: int) -> Tensor:
    """Images as a ViT's processor prepares them: `(images, 3, size, size)` from -1 to 1."""
    resized = np.stack([np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)) for image in images])
    return torch.from_numpy(resized).permute(0, 3, 1, 2).float() / 127.5 - 1
