"""Where each family of Vision Transformers keeps its parts: one row of data per family.

A model is looked up by package and class name over the bases of every submodule, so no modelling code is ever
imported, and heads, two-tower models and vision-language models that hold a tower need no row of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import UnsupportedModel


@dataclass(frozen=True)
class Family:
    """Paths are dotted attribute names: `blocks` and `seed` start at the tower, `down` and `attention` at a block.

    Where releases or variants of a library name a thing differently, a path may be a tuple of paths: the first one
    that is there counts.

    Args:
        towers: class names of the modules that hold the blocks.
        blocks: the list of blocks; each takes `(batch, tokens, channels)` first and returns it, alone or first in a
            tuple.
        down: the MLP's second linear, whose input is the neuron activation.
        attention: the attention module.
        prefix: tokens in front of the patches (class and distillation token).
        prefix_from: attribute of the tower that holds how many more there are (native registers), if any.
        seed: the norm between embeddings and first block, which a register that joins with the embeddings passes too.
        masks: the attention's arguments that are masks or biases over its tokens.
        padded: the first of them marks patches that are padding, which the family has.
        rope: the attention's argument that holds rotary tables, if any.
        positions: the attention's argument that holds the tokens' positions, 0 to tokens - 1 where it is not given.
        bias: the module of a block, or of its attention, that makes a position bias for the tokens it is told of.
        shared_bias: the module of the tower that makes one for all blocks.
        package: top-level package of the tower class.
    """

    towers: str | tuple[str, ...]
    blocks: str | tuple[str, ...]
    down: str | tuple[str, ...] = "mlp.fc2"
    attention: str | tuple[str, ...] = ("attention.attention", "attention")
    prefix: int = 1
    prefix_from: str | None = None
    seed: str | None = None
    masks: tuple[str, ...] = ("attention_mask",)
    padded: bool = False
    rope: str | None = None
    positions: str | None = None
    bias: str | tuple[str, ...] = ()
    shared_bias: str | tuple[str, ...] = ()
    package: str = "transformers"


LAYERS = ("layers", "encoder.layer")  # transformers moved the blocks of its ViTs, and named their MLPs anew, within 5.x
MLP = ("mlp.fc2", "output.dense")
SWIGLU = ("mlp.fc2", "mlp.down_proj", "mlp.weights_out")
BIASED: dict[str, Any] = {
    "masks": ("attention_mask", "relative_position_bias"),
    "bias": ("relative_position_bias", "attention.attention.relative_position_bias"),
    "shared_bias": ("shared_position_bias", "encoder.relative_position_bias"),
}
TIMM: dict[str, Any] = {
    "attention": "attn",
    "prefix": 0,
    "prefix_from": "num_prefix_tokens",
    "seed": "norm_pre",
    "masks": ("attn_mask",),
    "package": "timm",
}


def _clip(*towers: str, seed: str | None = "pre_layrnorm", prefix: int = 1, **more: Any) -> Family:
    """One of the many towers that are built as CLIP's is."""
    return Family(towers, "encoder.layers", attention="self_attn", seed=seed, prefix=prefix, **more)


FAMILIES: dict[str, Family] = {
    "vit": Family("ViTModel", LAYERS, MLP),
    "deit": Family("DeiTModel", LAYERS, MLP, prefix=2),
    "vit-msn": Family("ViTMSNModel", LAYERS, MLP),
    "vit-mae": Family("ViTMAEModel", LAYERS, MLP),
    "ijepa": Family("IJepaModel", LAYERS, MLP, prefix=0),
    "dinov2": Family(("Dinov2Model", "Dinov2Backbone"), "encoder.layer", SWIGLU),
    "dinov2-with-registers": Family(
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
        "encoder.layer",
        SWIGLU,
        prefix_from="config.num_register_tokens",
    ),
    "dinov3": Family(
        ("DINOv3ViTModel", "DINOv3ViTBackbone"),
        ("model.layer", "layer"),
        "mlp.down_proj",
        prefix_from="config.num_register_tokens",
        rope="position_embeddings",
    ),
    "beit": Family(("BeitModel", "BeitBackbone"), LAYERS, MLP, **BIASED),
    "data2vec-vision": Family("Data2VecVisionModel", LAYERS, MLP, **BIASED),
    "dpt": Family("DPTModel", LAYERS, MLP),
    "pixio": Family("PixioModel", LAYERS, MLP, prefix=0, prefix_from="config.n_cls_tokens"),
    "tips-v2": Family("Tipsv2VisionModel", "encoder.layer", SWIGLU, prefix_from="config.num_register_tokens"),
    "clip": _clip("CLIPVisionModel", "CLIPVisionTransformer"),
    "metaclip-2": _clip("MetaClip2VisionModel", "MetaClip2VisionTransformer"),
    "chinese-clip": _clip("ChineseCLIPVisionModel", "ChineseCLIPVisionTransformer"),
    "altclip": _clip("AltCLIPVisionModel", "AltCLIPVisionTransformer"),
    "clipseg": _clip("CLIPSegVisionModel", "CLIPSegVisionTransformer"),
    "owlvit": _clip("OwlViTVisionTransformer", seed="pre_layernorm"),
    "owlv2": _clip("Owlv2VisionTransformer", seed="pre_layernorm"),
    "mlcd": _clip("MLCDVisionModel", "MLCDVisionTransformer", rope="position_embeddings"),
    "git": _clip("GitVisionTransformer"),
    "kosmos-2": _clip("Kosmos2VisionTransformer"),
    "siglip": _clip("SiglipVisionModel", "SiglipVisionTransformer", seed=None, prefix=0),
    "janus": _clip("JanusVisionModel", seed=None, prefix=0),
    "siglip2": _clip("Siglip2VisionModel", "Siglip2VisionTransformer", seed=None, prefix=0, padded=True),
    "idefics2": _clip("Idefics2VisionTransformer", seed=None, prefix=0, padded=True),
    "idefics3": _clip("Idefics3VisionTransformer", seed=None, prefix=0, padded=True),
    "smolvlm": _clip("SmolVLMVisionTransformer", seed=None, prefix=0, padded=True),
    "blip": _clip("BlipVisionModel", seed=None),
    "blip-2": _clip("Blip2VisionModel", seed=None),
    "instructblip": _clip("InstructBlipVisionModel", seed=None),
    "aimv2": Family("Aimv2VisionModel", "encoder.layers", "ffn.down_proj", prefix=0),
    "internvl": Family("InternVLVisionModel", "encoder.layer"),
    "videomae": Family("VideoMAEModel", LAYERS, MLP, prefix=0),
    "vjepa2": Family("VJEPA2Encoder", "layer", prefix=0, positions="position_mask"),
    "timm-vit": Family("VisionTransformer", "blocks", **TIMM),
    "timm-eva": Family("Eva", "blocks", rope="rope", **TIMM),
    "open-clip": Family(
        "VisionTransformer",
        "transformer.resblocks",
        "mlp.c_proj",
        "attn",
        seed="ln_pre",
        masks=("attn_mask",),
        package="open_clip",
    ),
    "torchvision-vit": Family(
        "VisionTransformer", "encoder.layers", "mlp.3", "self_attention", masks=("attn_mask",), package="torchvision"
    ),
}

WINDOWS = "it attends inside windows, and a register, which belongs to the whole image, is in none of them"
NO_TOKENS = "it is a convolutional network, without tokens that a register could join"
PACKED = "it packs the patches of all images into one sequence, where a register would be shared between images"
POOLED = "it merges its tokens between stages, so a register cannot travel from block to block"

REFUSED: dict[str, str] = {
    **dict.fromkeys(("SwinModel", "SwinBackbone", "Swinv2Model", "Swinv2Backbone", "SwinTransformer"), WINDOWS),
    **dict.fromkeys(("SwinTransformerV2", "DonutSwinModel", "MaskFormerSwinModel", "Swin2SRModel"), WINDOWS),
    **dict.fromkeys(
        ("SamVisionEncoder", "SamHQVisionEncoder", "Sam3ViTModel", "VitDetModel", "VitDetBackbone"), WINDOWS
    ),
    **dict.fromkeys(("GotOcr2VisionEncoder", "VisionTransformerSAM"), WINDOWS),
    **dict.fromkeys(
        ("ConvNextModel", "ConvNextBackbone", "ConvNextV2Model", "ConvNextV2Backbone", "ConvNeXt"), NO_TOKENS
    ),
    **dict.fromkeys(("ResNetModel", "ResNetBackbone", "ResNet", "DINOv3ConvNextModel", "ModifiedResNet"), NO_TOKENS),
    **dict.fromkeys(("Qwen2VisionTransformerPretrainedModel", "Qwen2_5_VisionTransformerPretrainedModel"), PACKED),
    **dict.fromkeys(("Qwen3VLVisionModel", "Glm4vVisionModel", "PixtralVisionModel", "NaFlexVit"), PACKED),
    **dict.fromkeys(("VideoLlama3VisionModel", "Kimi_K25VisionModel"), PACKED),
    **dict.fromkeys(("HieraModel", "HieraBackbone", "Hiera", "Sam2HieraDetModel", "PvtModel", "PvtV2Model"), POOLED),
    **dict.fromkeys(("SegformerModel", "MultiScaleVit", "LevitModel"), POOLED),
    "Beit": "its attention keeps a position table of fixed size (the same model in transformers, BeitModel, can)",
}


@dataclass(frozen=True)
class Tower:
    """A vision tower found inside a model.

    Attributes:
        path: dotted name of the tower in the model, `""` where the model is the tower.
        family: its key in `FAMILIES`, and `row` what is there.
        prefix: number of tokens in front of the patches, class, distillation and native register tokens together.
        channels: width of the residual stream.
        neurons: number of MLP neurons per block.
    """

    path: str
    family: str
    row: Family
    module: nn.Module
    blocks: tuple[nn.Module, ...]
    downs: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    seed: nn.Module | None
    prefix: int
    channels: int
    neurons: tuple[int, ...]


def find_tower(model: nn.Module) -> Tower:
    """The one vision tower of `model`: a tower, a model with a head, a pipeline, a vision-language model.

    Raises:
        UnsupportedModel: no submodule belongs to a known family, or more than one tower does.
    """
    if not isinstance(model, nn.Module):
        inner = getattr(model, "model", None)  # a transformers pipeline
        if not isinstance(inner, nn.Module):
            raise UnsupportedModel(f"a model is needed, a torch.nn.Module, but {type(model).__name__} was given.")
        model = inner
    if isinstance(model, nn.DataParallel):
        raise UnsupportedModel(
            "nn.DataParallel copies a model to other devices at every call, its patch not among the copies: use "
            "DistributedDataParallel, or patch model.module on one device."
        )
    towers: list[Tower] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{tower.path}.") or not tower.path for tower in towers):
            continue  # inside a tower that is already found
        for name, family in FAMILIES.items():
            if _belongs(module, family):
                towers.append(resolve(path, module, name, family))
                break
    if not towers:
        raise UnsupportedModel(_refused(model) or _unknown(model))
    if len(towers) > 1:
        raise UnsupportedModel(
            f"{type(model).__name__} holds {len(towers)} vision towers ({', '.join(tower.path for tower in towers)}): "
            f"pass one of them, as in testreg.find(model.{towers[0].path}, images)."
        )
    return towers[0]


def reach(module: nn.Module, paths: str | tuple[str, ...]) -> Any:
    """The attribute at a dotted path, or at the first of several that is there; None where there is none."""
    path = path_to(module, paths)
    return None if path is None else walk(module, path)


def path_to(module: nn.Module, paths: str | tuple[str, ...]) -> tuple[str, ...] | None:
    """The dotted path, or the first of several, at which there is something, in its parts; None where there is none."""
    parts = (tuple(path.split(".")) for path in each(paths))
    return next((path for path in parts if walk(module, path) is not None), None)


def walk(module: Any, path: tuple[str, ...]) -> Any:
    """The attribute at a path in its parts; None where there is none."""
    for name in path:
        module = getattr(module, name, None)
    return module


def each(names: str | tuple[str, ...]) -> tuple[str, ...]:
    """The paths or class names of a row's field, which may be one or several."""
    return (names,) if isinstance(names, str) else tuple(names)


def _belongs(module: nn.Module, family: Family) -> bool:
    classes = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.split(".")[0] == family.package}
    return not classes.isdisjoint(each(family.towers)) and isinstance(
        reach(module, family.blocks), (nn.ModuleList, nn.Sequential)
    )


def resolve(path: str, module: nn.Module, name: str, family: Family) -> Tower:
    blocks = tuple(reach(module, family.blocks))
    if not blocks:
        raise UnsupportedModel(f"{type(module).__name__} has no blocks, so there is nothing to patch.")
    downs, attentions = [], []
    for index, block in enumerate(blocks):
        down, attention = reach(block, family.down), reach(block, family.attention)
        if down is None or attention is None:
            missing = " or ".join(each(family.down if down is None else family.attention))
            raise UnsupportedModel(
                f"{type(module).__name__} is of the family {name!r}, but its block {index} ({type(block).__name__}) "
                f"has no {missing}: it is built in another way than its family, and cannot be patched."
            )
        downs.append(down)
        attentions.append(attention)
    seed = reach(module, family.seed) if family.seed else None
    return Tower(
        path=path,
        family=name,
        row=family,
        module=module,
        blocks=blocks,
        downs=tuple(downs),
        attentions=tuple(attentions),
        seed=None if isinstance(seed, nn.Identity) else seed,
        prefix=family.prefix + (int(reach(module, family.prefix_from)) if family.prefix_from else 0),
        channels=int(downs[0].out_features),
        neurons=tuple(int(down.in_features) for down in downs),
    )


def _refused(model: nn.Module) -> str | None:
    for path, module in model.named_modules():
        for name in (cls.__name__ for cls in type(module).__mro__):
            if name in REFUSED:
                what = type(model).__name__ + (f" (in its {path}, a {name})" if path else "")
                return f"{what} cannot have registers: {REFUSED[name]}."
    return None


def _unknown(model: nn.Module) -> str:
    name, package = type(model).__name__, type(model).__module__.split(".")[0]
    if getattr(model, "main_input_name", "") == "input_ids":
        return (
            f"{name} is a text model; testreg patches Vision Transformers ({', '.join(FAMILIES)}). Whether it has "
            f"attention sinks tells testreg.inspect(model, text=...), or testreg inspect MODEL --text FILE."
        )
    return (
        f"{name} is of no known family ({', '.join(FAMILIES)}). If it is a Vision Transformer whose blocks take "
        f"(batch, tokens, channels), describe it first, with the paths and number of prefix tokens checked:\n"
        f'    testreg.FAMILIES["my-vit"] = testreg.Family(\n'
        f"        {_guess(model)}, package={package!r})"
    )


def _guess(model: nn.Module) -> str:
    """The row that would describe `model`, as far as names can tell."""
    lists = (
        (path, module) for path, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))
    )
    path, blocks = max(
        ((path, blocks) for path, blocks in lists if len({type(block) for block in blocks}) == 1),
        key=lambda item: len(item[1]),
        default=("encoder.layers", []),
    )
    parts = dict(blocks[0].named_modules()) if len(blocks) else {}
    attention = next((name for name in parts if "att" in name.lower()), "attention")
    linears = [
        name for name, part in parts.items() if isinstance(part, nn.Linear) and not name.startswith(f"{attention}.")
    ]
    tokens = ("cls", "class", "dist")
    prefix = sum(any(part in name.lower() for part in tokens) for name, _ in model.named_parameters() if "tok" in name)
    down = linears[-1] if linears else "mlp.fc2"
    return f'"{type(model).__name__}", "{path}", "{down}", "{attention}", prefix={prefix}'
