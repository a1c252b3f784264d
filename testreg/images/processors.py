"""The image processor of a model: where it is found, how it is named, and how it is called."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..runtime.errors import BadImages
from .decode import reason
from .takes import PIXELS, Takes, pixels, taken_by

# Mean and standard deviation of the colours, per channel, that many models were trained with.
NORMS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
WRITTEN = (
    "SIZE:MEAN:STD, as in 224:0.5:0.5 or 224:0.485,0.456,0.406:0.229,0.224,0.225, or 224:imagenet or 224:clip for the "
    "usual ones"
)
HOW = (
    "put a preprocessor_config.json beside the weights, copied from a checkpoint whose images are prepared alike; or "
    "pass processor=NAME (--processor NAME on the command line) with that checkpoint's name, or with the numbers, as "
    "in 224:0.5:0.5 (size, mean, standard deviation); or give tensors of processed pixel values"
)
# What processors of vision-language models say of the parts that they cut images into; no vision tower takes it.
OF_PARTS = ("image_sizes", "num_crops", "num_patches", "batch_num_images")

Processor = Callable[..., Any]


def chosen(processor: Any, model: Any, takes: Takes) -> Processor:
    """The processor to use: `processor`, given as it is or by its name, else the model's own.

    Raises:
        BadImages: there is none, it cannot be used, or it does not fit what the model takes.
    """
    if processor is None and model is None:
        raise BadImages("pass processor=NAME, the name of a checkpoint that has one, or one that is loaded.")
    any_function = callable(processor) and not hasattr(processor, "model_input_names")
    if takes.channels not in (1, 3) and not any_function:
        raise BadImages(
            f"{takes.model} takes images of {takes.channels} channels, which no picture has: pass tensors of processed "
            f"pixel values (images, {takes.channels}, height, width), or as processor a function that makes such a "
            f"tensor, without the first axis, of an RGB picture."
        )
    if processor is None:
        found = processor_for(model)
    elif isinstance(processor, (str, os.PathLike)):
        found = named(os.fspath(processor), takes)
    else:
        found = processor
    attribute = "image_processor" if takes.frames is None else "video_processor"
    found = getattr(found, attribute, None) or getattr(found, "image_processor", None) or found
    if not callable(found):
        raise BadImages(f"{type(found).__name__} is no image processor: a callable, or the name of one, is needed.")
    _fits(found, takes)
    return found


def processor_for(model: Any) -> Any:
    """The image processor, of models of videos the video processor, that lies with the checkpoint that `model` was
    loaded from; a pipeline's own, or what `model.image_processor` was set to.

    Raises:
        BadImages: the model was not loaded from a checkpoint, or there is no readable image processor with it.
    """
    own = getattr(model, "image_processor", None)
    if own is not None:
        return own
    name = getattr(model, "name_or_path", "")
    if name:
        return _loaded(name, taken_by(model))
    kind = type(model).__name__
    if getattr(model, "pretrained_cfg", None):
        line = "timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
        raise BadImages(f"{kind} is of timm: pass processor={line}, or images as tensors of processed pixel values.")
    raise BadImages(
        f"{kind} was not loaded from a checkpoint of its own. Where it is the vision tower of a larger model, pass "
        f"that model instead, as in testreg.find(model, images), which looks at its tower alone; else pass "
        f"processor=NAME with the name of the checkpoint that it comes from or resembles, or with the numbers, as in "
        f"processor='224:0.5:0.5' (size, mean, standard deviation), or images as tensors of processed pixel values."
    )


def named(text: str, takes: Takes = Takes()) -> Any:  # noqa: B008, it is frozen
    """The processor that `text` names: a checkpoint, by its directory or on the hub, or the numbers of one.

    The numbers are SIZE:MEAN:STD, the mean and the standard deviation of colours from 0 to 1, one for all channels or
    one each; or SIZE:imagenet or SIZE:clip. The shorter side becomes SIZE pixels, and the middle is cut out.

    Raises:
        BadImages: it is neither.
    """
    if not re.match(r"\d+(:|$)", text) or os.path.exists(os.path.expanduser(text)):
        return _loaded(text, takes)
    size, *rest = text.split(":")
    try:
        mean, std = NORMS[rest[0]] if len(rest) == 1 else (_values(part, takes.channels) for part in rest)
    except (KeyError, ValueError, IndexError) as error:
        raise BadImages(f"{text!r} is no image processor: the numbers of one are {WRITTEN}.") from error
    if not 8 <= int(size) <= 8192 or not all(value > 0 for value in std):
        raise BadImages(
            f"{text!r} is no image processor: SIZE is from 8 to 8192 pixels, and STD above 0, in {WRITTEN}."
        )
    import transformers

    kind = transformers.CLIPImageProcessor if takes.frames is None else transformers.VideoMAEImageProcessor
    side = int(size)
    return kind(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(mean),
        image_std=list(std),
    )


def call(
    processor: Processor, picture: Image.Image | list[Image.Image], takes: Takes, **more: Any
) -> dict[str, Tensor]:
    """Model inputs of one picture, or of one clip, each tensor with an axis of 1 first.

    Args:
        more: settings of the call, for processors of transformers.

    Raises:
        Exception: whatever the processor raises; TypeError or ValueError, where it makes something else.
    """
    of_transformers = hasattr(processor, "model_input_names")
    output: Any
    if not of_transformers and isinstance(picture, list):
        frames = [torch.as_tensor(processor(frame, **more)) for frame in picture]
        output = torch.stack([frame[0] if frame.ndim == 4 else frame for frame in frames])
    elif not of_transformers:
        output = processor(picture, **more)
    else:
        settings: dict[str, Any] = {**_gray(processor, takes), **more}
        if hasattr(processor, "sample_frames"):
            settings["do_sample_frames"] = False  # these are those that the model sees
        if hasattr(processor, "do_image_splitting"):
            settings["do_image_splitting"] = False
        output = processor(picture, return_tensors="pt", **settings)
    if isinstance(output, Tensor):
        output = {PIXELS[0]: output if output.ndim >= 4 else output[None]}
    if not isinstance(output, Mapping):
        raise TypeError(f"the processor makes a {type(output).__name__} of it, not a tensor or a dict of tensors")
    inputs = {key: value for key, value in output.items() if isinstance(value, Tensor)}
    for key in PIXELS:
        if key in inputs and isinstance(picture, list) and inputs[key].ndim == 4:
            inputs[key] = inputs[key][None]  # (frames, channels, height, width) -> (1, frames, ...)
    return inputs if takes.frames is not None or takes.packed else _whole(inputs)


def _whole(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole picture, where the processor of a vision-language model cuts it into parts and puts it before them."""
    inputs = {key: value for key, value in inputs.items() if key not in OF_PARTS}
    seen = pixels(inputs)
    if seen is None or seen.ndim != 5:
        return inputs
    mask = inputs.pop("pixel_attention_mask", None)  # (1, parts, height, width), of pixels
    if mask is not None and not mask[:, 0].all():
        raise ValueError("the processor pads the picture: pass the processor of the vision tower alone")
    return {**inputs, PIXELS[0]: seen[:, 0]}


def _gray(processor: Any, takes: Takes) -> dict[str, Any]:
    """Settings of a call with a picture of one channel."""
    if takes.channels != 1:
        return {}
    values = {name: getattr(processor, name, None) for name in ("image_mean", "image_std")}
    alike = {name: [value[0]] for name, value in values.items() if isinstance(value, (list, tuple))}
    return {"do_convert_rgb": False, **alike}


def _fits(processor: Any, takes: Takes) -> None:
    """Whether a processor of transformers can make what the model takes of pictures."""
    if not hasattr(processor, "model_input_names"):
        return  # a function may make anything, and what it makes is looked at
    mean, std = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
    for values in (mean, std) if getattr(processor, "do_normalize", True) else ():
        if isinstance(values, (list, tuple)) and len(values) != takes.channels and len(set(values)) > 1:
            raise BadImages(
                f"{takes.model} takes images of {takes.channels} channel{'s' * (takes.channels > 1)}, and its image "
                f"processor has means and standard deviations of {len(values)}: {mean}, {std}. Write one "
                f"per channel into its preprocessor_config.json, or pass processor='SIZE:MEAN:STD' (--processor on "
                f"the command line), as in 224:0.5:0.5."
            )


def _loaded(name: str, takes: Takes) -> Any:
    """What lies with a checkpoint, or is described by a file `preprocessor_config.json`."""
    import transformers  # slow to import, and tensors need none of it

    place = Path(name).expanduser()
    if place.is_file():
        place = place.parent
    elif not place.exists() and (name.startswith((".", "~", "/")) or name.count("/") > 1):
        raise BadImages(f"there is no directory {name}: give one with a preprocessor_config.json, or {WRITTEN}.")
    kinds: list[Any] = [transformers.AutoImageProcessor]
    if takes.frames is not None:
        kinds.insert(0, transformers.AutoVideoProcessor)
    failures = []
    for kind in kinds:
        try:
            return kind.from_pretrained(place if place.exists() else name)
        except Exception as error:  # whatever a damaged file, an unreachable hub or a missing library raises
            failures.append(error)
    what = "image" if takes.frames is None else "video or image"
    said = reason(failures[0])
    if place.is_dir() and not any(place.glob("*processor_config.json")):
        said = "it has no preprocessor_config.json"
    how = f"install that; or {HOW}" if isinstance(failures[0], ImportError) else HOW
    raise BadImages(f"there is no usable {what} processor with {name!r} ({said}): {how}.") from failures[0]


def _values(text: str, channels: int) -> list[float]:
    values = [float(value) for value in text.split(",")]
    if len(values) not in (1, channels) or not all(abs(value) < 1000 for value in values):
        raise ValueError(text)
    return values * (channels if len(values) == 1 else 1)
