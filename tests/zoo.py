"""Tiny random models, at least one per family, from the Config classes of the libraries themselves.

`MODELS` maps a family to its rows; `build(name)` gives one of them with example inputs. Widths are tiny (32 channels, 3
blocks, 16 patches), weights are of unit gain, so that every block, neuron and position changes the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

SIZE, PATCH, CHANNELS, BLOCKS, NEURONS = 32, 8, 32, 3, 48
BATCH = 2

VISION = {
    "hidden_size": CHANNELS, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "intermediate_size": NEURONS,
    "image_size": SIZE, "patch_size": PATCH,
}  # fmt: skip
DINO = {key: value for key, value in VISION.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
TEXT = {
    "hidden_size": CHANNELS, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": NEURONS,
    "vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """One tiny model.

    Attributes:
        make: builds it, untrained.
        inputs: gives example inputs of a batch of images.
        other: inputs of other sizes that the model takes, non-square ones among them.
        text: the model reads text as well.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    other: tuple[Callable[[int], dict[str, Any]], ...] = ()
    text: bool = False


def build(name: str, batch: int = BATCH) -> tuple[nn.Module, dict[str, Any]]:
    """The tiny model called `name` in evaluation mode, and example inputs; the same at every call."""
    tiny = ROWS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny.make().eval()
        scale(model)
        return model, tiny.inputs(batch)


@torch.no_grad()
def scale(model: nn.Module) -> None:
    """Random weights of unit gain: with the usual initial ones, a block of 32 channels does next to nothing."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) and name == "weight":
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            elif "Norm" in type(module).__name__ and name == "weight":
                parameter.normal_(1, 0.1)
            elif parameter.ndim:
                parameter.normal_(0, 0.3)


def images(height: int = SIZE, width: int = SIZE, **more: Any) -> Callable[[int], dict[str, Any]]:
    def inputs(batch: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        return {"pixel_values": torch.randn(64, 3, height, width, generator=generator)[:batch], **more}

    return inputs


def images_and_text(**more: Any) -> Callable[[int], dict[str, Any]]:
    def inputs(batch: int) -> dict[str, Any]:
        ids = torch.arange(1, 7).repeat(batch, 1) + torch.arange(batch)[:, None]
        ids[:, -1] = TEXT["eos_token_id"]
        return {"input_ids": ids, **images(**more)(batch)}

    return inputs


ANY_SIZE = (images(24, 40), images(48, 32))  # position embeddings always interpolated
INTERPOLATED = tuple(images(*size, interpolate_pos_encoding=True) for size in ((24, 40), (48, 32)))


def _tiny(model: type, config: Any, inputs: Any = None, **more: Any) -> Tiny:
    return Tiny(lambda: model(config()), inputs or images(), **more)


def _dinov2(model: type, config: type = hf.Dinov2Config, **more: Any) -> Tiny:
    return _tiny(model, lambda: config(**DINO, **more), other=ANY_SIZE)


def _clip(model: type, vision: bool) -> Tiny:
    if vision:
        return _tiny(model, lambda: hf.CLIPVisionConfig(**VISION, projection_dim=16, num_labels=5), other=INTERPOLATED)
    return _tiny(
        model,
        lambda: hf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16),
        images_and_text(),
        text=True,
    )


MODELS: Mapping[str, Mapping[str, Tiny]] = {
    "vit": {
        "ViTModel": _tiny(hf.ViTModel, lambda: hf.ViTConfig(**VISION), other=INTERPOLATED),
        "ViTForImageClassification": _tiny(
            hf.ViTForImageClassification, lambda: hf.ViTConfig(**VISION, num_labels=5), other=INTERPOLATED
        ),
    },
    "deit": {
        "DeiTModel": _tiny(hf.DeiTModel, lambda: hf.DeiTConfig(**VISION), other=INTERPOLATED),
        "DeiTForImageClassification": _tiny(
            hf.DeiTForImageClassification, lambda: hf.DeiTConfig(**VISION, num_labels=5)
        ),
    },
    "dinov2": {
        "Dinov2Model": _dinov2(hf.Dinov2Model),
        "Dinov2Model-SwiGLU": _dinov2(hf.Dinov2Model, use_swiglu_ffn=True),
        "Dinov2Backbone": _dinov2(hf.Dinov2Backbone, out_features=["stage2", "stage3"]),
        "Dinov2ForImageClassification": _dinov2(hf.Dinov2ForImageClassification, num_labels=5),
    },
    "dinov2-with-registers": {
        "Dinov2WithRegistersModel": _dinov2(hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig),
        "Dinov2WithRegistersModel-SwiGLU": _dinov2(
            hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig, use_swiglu_ffn=True
        ),
        "Dinov2WithRegistersBackbone": _dinov2(
            hf.Dinov2WithRegistersBackbone, hf.Dinov2WithRegistersConfig, out_features=["stage1", "stage3"]
        ),
    },
    "clip": {
        "CLIPVisionModel": _clip(hf.CLIPVisionModel, True),
        "CLIPVisionModelWithProjection": _clip(hf.CLIPVisionModelWithProjection, True),
        "CLIPModel": _clip(hf.CLIPModel, False),
        "CLIPForImageClassification": _tiny(
            hf.CLIPForImageClassification,
            lambda: hf.CLIPConfig(text_config=TEXT, vision_config=VISION, num_labels=5),
        ),
    },
    "siglip": {
        "SiglipVisionModel": _tiny(hf.SiglipVisionModel, lambda: hf.SiglipVisionConfig(**VISION), other=INTERPOLATED),
        "SiglipVisionModel-no-head": _tiny(
            hf.SiglipVisionModel, lambda: hf.SiglipVisionConfig(**VISION, vision_use_head=False)
        ),
        "SiglipModel": _tiny(
            hf.SiglipModel,
            lambda: hf.SiglipConfig(text_config=TEXT, vision_config=VISION),
            images_and_text(),
            text=True,
        ),
        "SiglipForImageClassification": _tiny(
            hf.SiglipForImageClassification,
            lambda: hf.SiglipConfig(text_config=TEXT, vision_config=VISION, num_labels=5),
        ),
    },
}

ROWS: Mapping[str, Tiny] = {name: tiny for rows in MODELS.values() for name, tiny in rows.items()}
FIRST = tuple(next(iter(rows)) for rows in MODELS.values())  # one model per family, for what takes long


def tensors(output: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor in a model's output, by its path: pooled, logits, hidden states, attentions, feature maps, text."""
    if isinstance(output, Tensor):
        return {path: output}
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, list | tuple):
        items = enumerate(output)
    else:
        return {}
    return {
        where: tensor for key, value in items for where, tensor in tensors(value, f"{path}.{key}".lstrip(".")).items()
    }
