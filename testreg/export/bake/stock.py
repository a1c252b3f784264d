"""A tower with register slots in the stock architectures that have them: names, shapes and arguments, no algebra."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ...runtime.errors import UnsupportedModel
from ...runtime.paths import reach
from ...runtime.towers import Tower
from . import of_timm
from .anatomy import parts

LIBRARIES: dict[str, tuple[str, ...]] = {  # family -> who has its architecture with register slots, the default first
    "dinov2": ("transformers", "timm"),
    "dinov2-with-registers": ("transformers", "timm"),
    "vit": ("timm",),
    "deit": ("timm",),
    "clip": ("timm",),
    "metaclip-2": ("timm",),
    "siglip": ("timm",),
    "timm-vit": ("timm",),
    "timm-eva": ("timm",),
}
# timm builds any width and depth from any of these; the name only says what the numbers are close to.
ARCHITECTURES = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 1024: "vit_large_patch16_224"}
BASE, CLIP, SWIGLU = "vit_base_patch16_224", "vit_base_patch16_clip_224", "vit_giant_patch14_dinov2"
ACTIVATIONS = {
    "gelu": None,
    "quick_gelu": "quick_gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def library_for(tower: Tower, wanted: str | None = None) -> str:
    """Who has the architecture of `tower` with register slots: "transformers" or "timm".

    Raises:
        UnsupportedModel: nobody has, or not the library that is wanted.
    """
    offered = LIBRARIES.get(tower.family, ())
    if not offered or wanted not in (None, *offered):
        raise UnsupportedModel(
            f"{f'{wanted} has no' if wanted else 'no library has a'} {tower.family} architecture with register slots, "
            f"so this patch cannot be made of weights alone (families that can: {', '.join(LIBRARIES)}): testreg.save "
            f"keeps it in a checkpoint with code."
        )
    if tower.family in of_timm.SLOTS:
        of_timm.check(tower)
    return wanted or offered[0]


def to_transformers(model: nn.Module, tower: Tower, registers: Tensor) -> Any:
    """The same weights as `Dinov2WithRegisters...`, with the head where that has one.

    Args:
        registers: what the slots hold `(registers, channels)`.
    """
    name = type(model).__name__.replace("WithRegisters", "").replace("Dinov2", "Dinov2WithRegisters")
    if not hasattr(transformers, name) or not name.startswith("Dinov2"):
        model, tower_path, name = tower.module, "", "Dinov2WithRegistersModel"
    else:
        tower_path = tower.path
    config: dict[str, Any] = reach(tower.module, "config").to_dict()
    for gone in ("model_type", "architectures", "stage_names", "use_mask_token", "transformers_version"):
        config.pop(gone, None)
    if "Backbone" not in name:
        config.pop("out_features", None), config.pop("out_indices", None)
    slots = torch.cat([*_native(tower), registers])
    config["num_register_tokens"] = len(slots)
    built = getattr(transformers, name)(transformers.Dinov2WithRegistersConfig(**config))
    inner = f"{built.base_model_prefix}." if tower_path else ""
    outer = f"{tower_path}." if tower_path else ""
    weights = {
        f"{inner}{key.removeprefix(outer)}" if key.startswith(outer) else key: value
        for key, value in model.state_dict().items()
    }
    weights[f"{inner}embeddings.register_tokens"] = slots[None]
    weights.setdefault(f"{inner}embeddings.mask_token", torch.zeros(1, tower.channels))
    built.load_state_dict(weights)
    return built.eval()


def to_timm(
    model: nn.Module, tower: Tower, registers: Tensor, processor: Any = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same weights under the names of timm's `VisionTransformer`, and the `config.json` that makes timm build it.

    Position embeddings are added to the class token here; a distillation token becomes one more register.
    """
    module, config = tower.module, reach(tower.module, "config")
    grid = _first(module, "embeddings.position_embeddings", "embeddings.position_embedding.weight").view(
        -1, tower.channels
    )
    pixels = _first(module, "embeddings.patch_embeddings.projection", "embeddings.patch_embedding")
    front = tower.prefix - sum(map(len, _native(tower)))  # prefix tokens with positions of their own
    prefix = [_first(module, "embeddings.cls_token", "embeddings.class_embedding")] if front else []
    prefix += [reach(module, "embeddings.distillation_token")] if front == 2 else []
    tokens = [token.view(-1) + grid[index] for index, token in enumerate(prefix)]
    slots = torch.cat([*(token[None] for token in tokens[1:]), *_native(tower), registers])
    weights = {"pos_embed": grid[front:][None], "reg_token": slots[None], **_linear("patch_embed.proj", pixels)}
    if tokens:
        weights["cls_token"] = tokens[0].view(1, 1, -1)
    norm = _first(module, "layernorm", "post_layernorm")
    first = parts(tower, 0)
    act = ACTIVATIONS.get(config.hidden_act, "") if first.up is None else None
    if act == "":
        raise UnsupportedModel(f"timm has no activation function {config.hidden_act!r} for its VisionTransformer.")
    hidden = first.down.in_features * (1 if first.up is None else 2)
    args: dict[str, Any] = {
        "img_size": _one(config.image_size),
        "patch_size": _one(config.patch_size),
        "in_chans": config.num_channels,
        "embed_dim": tower.channels,
        "depth": len(tower.blocks),
        "num_heads": first.heads,
        "mlp_ratio": _ratio(hidden, tower.channels),
        "qkv_bias": first.query.bias is not None,
        "class_token": bool(tokens),
        "reg_tokens": len(slots),
        "no_embed_class": True,
        "pre_norm": tower.seed is not None,
        "init_values": None if first.scale1 is None else 1.0,
    }
    if first.up is None:
        args["act_layer"] = act
    if tower.family.startswith("dinov2"):
        args["dynamic_img_size"] = True  # as in transformers
    for index in range(len(tower.blocks)):
        weights |= _block(tower, index)
    if tower.seed is not None:
        weights |= _linear("norm_pre", tower.seed)
    head, head_args = _head(model, tower)
    args |= head_args
    if args.get("final_norm", True):
        weights |= _linear("norm", norm)
    weights |= head
    classes = len(head["head.weight"]) if "head.weight" in head else 0
    eps = getattr(norm, "eps", 1e-6)
    name = SWIGLU if first.up is not None else CLIP if eps == 1e-5 else ARCHITECTURES.get(tower.channels, BASE)
    sides = [args["img_size"]] * 2 if isinstance(args["img_size"], int) else args["img_size"]
    cfg = {
        "input_size": [config.num_channels, *sides],
        "fixed_input_size": not args.get("dynamic_img_size", False),
        "num_classes": classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **_preprocessing(processor),
    }
    stock = {
        "model_type": "timm_wrapper",
        "architecture": name,
        "num_classes": classes,
        "num_features": tower.channels,
        "model_args": args,
    }
    names = labels(model, classes) if reach(model, "classifier") is not None else {}
    return weights, {**stock, "global_pool": args["global_pool"], "pretrained_cfg": cfg, **names}


def _block(tower: Tower, index: int) -> dict[str, Tensor]:
    part, at = parts(tower, index), f"blocks.{index}."
    weights = _linear(f"{at}norm1", part.norm1) | _linear(f"{at}norm2", part.norm2)
    weights |= _linear(f"{at}attn.qkv", part.query, part.key, part.value) | _linear(f"{at}attn.proj", part.out)
    gate = (part.gate,) if part.up is None else (part.gate, part.up)
    weights |= _linear(f"{at}mlp.fc1", *gate) | _linear(f"{at}mlp.fc2", part.down)
    for number, scale in enumerate((part.scale1, part.scale2), start=1):
        if scale is not None:
            weights[f"{at}ls{number}.gamma"] = scale
    return weights


def _linear(name: str, *modules: Any) -> dict[str, Tensor]:
    """Weight and bias of one module, or of several beside each other."""
    weights = {f"{name}.weight": torch.cat([module.weight for module in modules])}
    if any(getattr(module, "bias", None) is not None for module in modules):
        weights[f"{name}.bias"] = torch.cat(
            [torch.zeros(len(module.weight)) if module.bias is None else module.bias for module in modules]
        )
    return weights


def _head(model: nn.Module, tower: Tower) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What follows the blocks, as far as timm has it: its weights and arguments."""
    kind, classifier = type(model).__name__, reach(model, "classifier")
    pool: dict[str, Any] = {"global_pool": "token" if tower.prefix else "avg", "fc_norm": False}
    if isinstance(classifier, nn.Linear) and classifier.in_features == tower.channels:
        if kind.startswith(("CLIP", "MetaClip2")):  # the mean of all patches, in front of the last norm
            pool = {"global_pool": "avg", "final_norm": False, "fc_norm": False}
        return _linear("head", classifier), pool
    projection = reach(model, "visual_projection")
    if isinstance(projection, nn.Linear):
        return {"head.weight": projection.weight, "head.bias": torch.zeros(projection.out_features)}, pool
    probe = reach(tower.module, "head")
    if probe is None or tower.family != "siglip":
        return {}, pool
    query, both = probe.attention.in_proj_weight.split([tower.channels, 2 * tower.channels])
    query_bias, both_bias = probe.attention.in_proj_bias.split([tower.channels, 2 * tower.channels])
    weights = {
        "attn_pool.latent": probe.probe,
        "attn_pool.q.weight": query,
        "attn_pool.q.bias": query_bias,
        "attn_pool.kv.weight": both,
        "attn_pool.kv.bias": both_bias,
        **_linear("attn_pool.proj", probe.attention.out_proj),
        **_linear("attn_pool.norm", probe.layernorm),
        **_linear("attn_pool.mlp.fc1", probe.mlp.fc1),
        **_linear("attn_pool.mlp.fc2", probe.mlp.fc2),
    }
    return weights, {"global_pool": "map"}


def _native(tower: Tower) -> list[Tensor]:
    """The registers that the model has already `[(registers, channels)]`, or nothing."""
    registers = reach(tower.module, "embeddings.register_tokens")
    return [] if registers is None else [registers.view(-1, tower.channels)]


def labels(model: Any, classes: int) -> dict[str, list[str]]:
    """The names of the classes, under the key that timm has for them, where there is one for each."""
    names = getattr(reach(model, "config"), "id2label", None)
    return {"label_names": [names[index] for index in range(classes)]} if names and len(names) == classes else {}


def _preprocessing(processor: Any) -> dict[str, Any]:
    """An image processor of transformers in timm's words."""
    if processor is None:
        return {}
    size, crop = _sides(getattr(processor, "size", None)), _sides(getattr(processor, "crop_size", None))
    cropped = getattr(processor, "do_center_crop", False) and crop and size
    values = {
        "mean": getattr(processor, "image_mean", None),
        "std": getattr(processor, "image_std", None),
        "interpolation": RESAMPLE.get(int(getattr(processor, "resample", 3) or 0), "bicubic"),
        "crop_pct": crop / size if cropped and crop and size else 1.0,
        "crop_mode": "center" if cropped else "squash",
    }
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in values.items() if value is not None
    }


def _sides(size: Any) -> int | None:
    if isinstance(size, Mapping):
        return size.get("shortest_edge") or size.get("height")
    return getattr(size, "shortest_edge", None) or getattr(size, "height", None) or size


def _first(module: nn.Module, *paths: str) -> Any:
    found = next((value for value in (reach(module, path) for path in paths) if value is not None), None)
    if found is None:
        raise UnsupportedModel(f"{type(module).__name__} has no {' or '.join(paths)}: it is built in another way.")
    return found


def _one(size: Any) -> Any:
    return size if isinstance(size, int) else (size[0] if len(set(size)) == 1 else list(size))


def _ratio(hidden: int, channels: int) -> float:
    """What timm multiplies with the width, and truncates, to have the MLP's."""
    ratio = hidden / channels
    return ratio if int(channels * ratio) == hidden else (hidden + 0.5) / channels
