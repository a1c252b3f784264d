"""Where each family of Vision Transformers keeps its parts: one row of data per family.

`towers` finds them in a model, by package and class name over the bases of every submodule: no modelling code is ever
imported, and heads, two-tower models and vision-language models that hold a tower need no row of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """Paths are dotted attribute names: `blocks` and `seed` start at the tower, `down` and `attention` at a block.

    Where releases or variants of a library name a thing differently, a path may be a tuple of paths: the first one
    that is there counts.

    Args:
        towers: class names of the modules that hold the blocks.
        blocks: the list of blocks, or of chunks of blocks; each block takes `(batch, tokens, channels)` first and
            returns it, alone or first in a tuple.
        down: the MLP's second linear, whose input is the neuron activation.
        attention: the attention module.
        prefix: tokens in front of the patches (class and distillation token).
        prefix_from: attribute of the tower that holds how many more there are (native registers), if any.
        seed: the norm between embeddings and first block, which a register that joins with the embeddings passes too.
        masks: the attention's arguments that are masks or biases over its tokens.
        padded: the first of them marks patches that are padding, which the family has.
        rope: the attention's argument that holds rotary tables, if any.
        turn: the attention's own callable that turns queries and keys `(batch, heads, tokens, channels)`, if any.
        positions: the attention's argument that holds the tokens' positions, 0 to tokens - 1 where it is not given.
        bias: the module of a block, or of its attention, that makes a position bias for the tokens it is told of.
        shared_bias: the module of the tower that makes one for all blocks.
        sequence_first: blocks take `(tokens, batch, channels)`.
        packed: blocks take the tokens of all images in one sequence, `(tokens, channels)` or `(1, tokens, channels)`;
            only registers that attention alone sees can be had there.
        segments: the attention's argument that says where each image begins and ends in that sequence,
            `(segments + 1,)`; None where a mask does, so that registers are shared by all images.
        batch_of_patches: a packed tower takes patches as `(1, patches, ...)`.
        merge: attribute of a packed tower: patches come in squares of so many by so many; None = row by row.
        window: attribute of a packed tower: patches come window by window, each of so many pixels by so many.
        masking: the method that leaves out random patches, and shuffles the others, where the tower has one:
            `(sequence, noise) -> (sequence, mask, order)`, as ViT-MAE's. While testreg looks it does neither.
        package: top-level package of the tower class, or several.
    """

    towers: str | tuple[str, ...]
    blocks: str | tuple[str, ...]
    down: str | tuple[str, ...] = "mlp.fc2"
    attention: str | tuple[str, ...] = ("attention.attention", "attention")
    prefix: int = 1
    prefix_from: str | tuple[str, ...] | None = None
    seed: str | None = None
    masks: tuple[str, ...] = ("attention_mask",)
    padded: bool = False
    rope: str | None = None
    turn: str | None = None
    positions: str | None = None
    bias: str | tuple[str, ...] = ()
    shared_bias: str | tuple[str, ...] = ()
    sequence_first: bool = False
    packed: bool = False
    segments: str | None = None
    batch_of_patches: bool = False
    merge: str | None = None
    window: str | None = None
    masking: str | None = None
    package: str | tuple[str, ...] = "transformers"


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
    # RADIO puts a generator of its own in place of timm's embeddings; num_tokens is what timm before 0.6 had.
    "prefix_from": ("patch_generator.num_skip", "num_prefix_tokens", "num_tokens"),
    "seed": "norm_pre",
    "masks": ("attn_mask",),
    "package": "timm",
}


RESBLOCKS: dict[str, Any] = {
    "blocks": "transformer.resblocks",
    "down": "mlp.c_proj",
    "attention": "attn",
    "seed": "ln_pre",
    "masks": ("attn_mask",),
}
W3, DOWN, FC2 = ("mlp.w3", "mlp.fc2"), "mlp.down_proj", "mlp.linear_fc2"
BIAS, MASK = ("attn_bias",), ("mask",)
MERGED, CONFIG_MERGED, WINDOW = "spatial_merge_size", "config.spatial_merge_size", "window_size"
HUB = ("dinov2", "depth_anything_v2", "vggt")  # whose copies of one file hold the same tower


def _clip(*towers: str, seed: str | None = "pre_layrnorm", prefix: int = 1, **more: Any) -> Family:
    """One of the many towers that are built as CLIP's is."""
    return Family(towers, "encoder.layers", attention="self_attn", seed=seed, prefix=prefix, **more)


def _packed(
    *towers: str, down: str = "mlp.fc2", blocks: str = "blocks", attention: str = "attn", **more: Any
) -> Family:
    """One of the towers that take the patches of all images as one sequence."""
    more = {"prefix": 0, "segments": "cu_seqlens", "rope": "position_embeddings", **more}
    return Family(towers, blocks, down, attention, packed=True, **more)


FAMILIES: dict[str, Family] = {
    "vit": Family("ViTModel", LAYERS, MLP),
    "deit": Family("DeiTModel", LAYERS, MLP, prefix=2),
    "vit-msn": Family("ViTMSNModel", LAYERS, MLP),
    "vit-mae": Family("ViTMAEModel", LAYERS, MLP, masking="embeddings.random_masking"),
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
    "ovis2": Family("Ovis2VisionModel", "transformer.encoder.layers", "ffn.down_proj", prefix=0),
    "radio": Family(
        "RadioModel",
        "encoder.layer",
        SWIGLU,
        prefix=0,
        prefix_from="config.num_summary_tokens",
        segments="cu_seqlens",  # where images of several sizes come packed
    ),
    "videomae": Family("VideoMAEModel", LAYERS, MLP, prefix=0),
    "vjepa2": Family("VJEPA2Encoder", "layer", prefix=0, positions="position_mask"),
    "timm-vit": Family("VisionTransformer", "blocks", **TIMM),
    "timm-eva": Family("Eva", "blocks", rope="rope", **TIMM),
    "timm-naflex": Family("NaFlexVit", "blocks", padded=True, rope="rope", **TIMM),
    "open-clip": Family("VisionTransformer", package="open_clip", **RESBLOCKS),
    "torchvision-vit": Family(
        "VisionTransformer", "encoder.layers", "mlp.3", "self_attention", masks=("attn_mask",), package="torchvision"
    ),
    # Makers' own code
    "openai-clip": Family("VisionTransformer", sequence_first=True, package=("clip", "alpha_clip"), **RESBLOCKS),
    "perception-encoder": Family(
        "VisionTransformer", prefix=0, prefix_from="use_cls_token", turn="rope", package="core", **RESBLOCKS
    ),
    "eva-clip": Family(
        "EVAVisionTransformer",
        "blocks",
        W3,
        "attn",
        masks=("attn_mask", "rel_pos_bias"),
        turn="rope",
        package="eva_clip",
    ),
    "dinov2-hub": Family(
        "DinoVisionTransformer", "blocks", W3, "attn", prefix_from="num_register_tokens", masks=BIAS, package=HUB
    ),
    "dinov3-hub": Family(
        "DinoVisionTransformer", "blocks", W3, "attn", prefix_from="n_storage_tokens", masks=BIAS, package="dinov3"
    ),
    "internvit": Family(
        "InternVisionModel", "encoder.layers", attention="attn", package=("transformers_modules", "internvl")
    ),
    "aimv2-apple": Family("AIMv2VisionEncoder", "trunk.blocks", attention="attn", prefix=0, masks=MASK, package="aim"),
    "jepa": Family(  # I-JEPA, V-JEPA and V-JEPA 2 all call their package so
        "VisionTransformer",
        "blocks",
        ("mlp.fc3", "mlp.fc2"),
        "attn",
        prefix=0,
        masks=("attn_mask",),
        positions="mask",
        package="src",
    ),
    "mae": Family(
        "MaskedAutoencoderViT",
        "blocks",
        attention="attn",
        masks=("attn_mask",),
        package=("models_mae", "mae"),
    ),
    # Packed towers
    "qwen2-vl": _packed("Qwen2VisionTransformerPretrainedModel", merge=MERGED),
    "qwen2.5-vl": _packed("Qwen2_5_VisionTransformerPretrainedModel", down=DOWN, merge=MERGED, window=WINDOW),
    "qwen2.5-omni": _packed("Qwen2_5OmniVisionEncoder", down=DOWN, merge=MERGED, window=WINDOW),
    "qwen3-vl": _packed("Qwen3VLVisionModel", "Qwen3VLMoeVisionModel", down=FC2, merge=MERGED),
    "qwen3-omni": _packed("Qwen3OmniMoeVisionEncoder", down=FC2, merge=MERGED),
    "qwen3.5": _packed("Qwen3_5VisionModel", "Qwen3_5MoeVisionModel", down=FC2, merge=MERGED),
    "qwen4": _packed("Qwen4ExpVisionModel", down=FC2, merge=MERGED),
    "cohere-compass": _packed("CohereCompassVisionModel", down=FC2, merge=MERGED),
    "exaone-4.5": _packed("Exaone4_5_VisionModel", down=DOWN, merge=MERGED, window=WINDOW),
    "glm-4v": _packed("Glm4vVisionModel", "Glm4vMoeVisionModel", down=DOWN, merge=MERGED),
    "glm-5": _packed("Glm5NextVisionModel", down=DOWN, merge=MERGED),
    "glm-ocr": _packed("GlmOcrVisionModel", down=DOWN, merge=MERGED),
    "glm-image": _packed("GlmImageVisionModel", merge=MERGED),
    "ernie-4.5-vl": _packed("Ernie4_5_VLMoeVisionTransformerPretrainedModel", merge=MERGED),
    "videollama-3": _packed("VideoLlama3VisionModel", blocks="encoder.layers", attention="self_attn", merge=MERGED),
    "paddleocr-vl": _packed(
        "PaddleOCRVisionTransformer", blocks="encoder.layers", attention="self_attn", batch_of_patches=True
    ),
    "kimi": _packed("Kimi_K25VisionModel", blocks="layers"),
    "hunyuan-vl": _packed("HunYuanVLVisionTransformer", blocks="layers", attention="self_attn"),
    "minimax-m3": _packed("MiniMaxM3VLVisionModel", blocks="layers", attention="self_attn", merge=MERGED),
    "cosmos-3": _packed("Cosmos3EdgeVisionModel", blocks="encoder.layers", attention="self_attn", merge=MERGED),
    "inkling-2": _packed("Inkling2VisionModel", blocks="layers", attention="self_attn", prefix=1, merge=CONFIG_MERGED),
    "muse": _packed("MuseGlimmerVisionModel", "MuseSparkVisionModel", blocks="layers", merge=MERGED, window=WINDOW),
    "pixtral": _packed(
        "PixtralVisionModel",
        blocks="transformer.layers",
        down="feed_forward.down_proj",
        attention="attention",
        segments=None,
    ),
}

WINDOWS = "it attends inside windows, and a register, which belongs to the whole image, is in none of them"
NO_TOKENS = "it is a convolutional network, without tokens that a register could join"
MERGED_INSIDE = "it merges its patches between two blocks, and registers would be measured for two kinds of tokens"
CONVOLVED = "some of its blocks are convolutions, in which nothing attends to a register"
EXPERTS = "its MLPs choose among experts, so no neuron sees all tokens"
UNCALLED = "its blocks are lists that are never called, so nothing can join before one or leave after it"
POOLED = "it merges its tokens between stages, so a register cannot travel from block to block"

REFUSED: dict[str, str] = {  # class names, or packages
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
    **dict.fromkeys(("HieraModel", "HieraBackbone", "Hiera", "Sam2HieraDetModel", "PvtModel", "PvtV2Model"), POOLED),
    **dict.fromkeys(("SegformerModel", "MultiScaleVit", "LevitModel"), POOLED),
    **dict.fromkeys(("MiniCPMV4_6VisionModel", "MiniCPMV4_7VisionModel", "MiniCPMOcrVisionModel"), MERGED_INSIDE),
    "Lfm3VlVisionModel": CONVOLVED,
    "Dots3NoteVisionModel": EXPERTS,
    "vit_pytorch": UNCALLED,
    "Beit": "its attention keeps a position table of fixed size (the same model in transformers, BeitModel, can)",
}
