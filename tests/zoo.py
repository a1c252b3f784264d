"""Tiny random models, at least one per family, from the Config classes of the libraries themselves.

`MODELS` maps a family to its rows; `build(name)` gives one of them with example inputs. Widths are tiny (32 channels, 3
blocks or 4, 16 patches), weights are of unit gain, so that every block, neuron and position changes the output.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import originals
import packaging.version
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from testreg.testing import attend_by as attention  # noqa: F401, by the names that the tests use
from testreg.testing import tensors  # noqa: F401
from testreg.testing import unit_gain as scale

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
        single: its norms compute in single precision, so that its weights cannot all be of another.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    other: tuple[Callable[[int], dict[str, Any]], ...] = ()
    text: bool = False
    single: bool = False


def given(down: nn.Module) -> list[Tensor]:
    """A list that gets what a second linear computes with from now on, register neurons at rest by then."""
    seen: list[Tensor] = []
    resting = down.forward.__self__  # what stands in for the module's forward, and calls it
    original = resting.original

    def forward(activation: Tensor) -> Tensor:
        seen.append(activation)
        return original(activation)

    resting.original = forward
    return seen


def build(name: str, batch: int = BATCH) -> tuple[nn.Module, dict[str, Any]]:
    """The tiny model called `name` in evaluation mode, and example inputs; the same at every call."""
    tiny = ROWS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny.make().eval()
        scale(model)
        return model, tiny.inputs(batch)


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


ANY_SIZE = (images(24, 40), images(48, 32))  # position embeddings are always interpolated
INTERPOLATED = tuple(images(*size, interpolate_pos_encoding=True) for size in ((24, 40), (48, 32)))


def named(name: str, inputs: Callable[[int], dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
    """The same images under another argument name."""
    return lambda batch: {name: inputs(batch)["pixel_values"]}


def clips(batch: int) -> Tensor:
    """Videos `(batch, frames, 3, height, width)`."""
    return torch.stack([images()(64)["pixel_values"][4 * index : 4 * index + 4] for index in range(batch)])


def shuffled(batch: int) -> dict[str, Any]:
    """Images for a masked autoencoder, which orders its patches by noise."""
    noise = torch.rand(1, (SIZE // PATCH) ** 2, generator=torch.Generator().manual_seed(2))
    return {**images()(batch), "noise": noise.expand(batch, -1)}


def padded(batch: int) -> dict[str, Any]:
    """Patches of images of different shapes, each followed by padding, as SigLIP2's processor gives them."""
    shapes = torch.tensor([[4, 4], [2, 6], [3, 3], [5, 3]]).repeat(16, 1)[:batch]
    real = torch.arange(16)[None] < shapes.prod(-1, keepdim=True)
    patches = torch.randn(64, 16, 3 * PATCH**2, generator=torch.Generator().manual_seed(1))[:batch]
    return {"pixel_values": patches * real[..., None], "pixel_attention_mask": real.long(), "spatial_shapes": shapes}


def part_masked(batch: int) -> dict[str, Any]:
    """Images that are smaller than the batch, and the mask of their patches."""
    mask = torch.ones(64, 4, 4, dtype=torch.bool)
    mask[::2, 3:], mask[1::3, :, 2:] = False, False
    return {**images()(batch), "patch_attention_mask": mask[:batch]}


def _tiny(model: str, config: str, inputs: Any = None, other: Any = (), text: bool = False, **settings: Any) -> Tiny:
    """A class and a config of transformers."""
    settings = {**VISION, **settings}
    return Tiny(lambda: getattr(hf, model)(getattr(hf, config)(**settings)), inputs or images(), other, text)


def _dinov2(model: str, config: str = "Dinov2Config", **settings: Any) -> Tiny:
    return Tiny(lambda: getattr(hf, model)(getattr(hf, config)(**DINO, **settings)), images(), ANY_SIZE)


def _two_towers(model: str, config: str, text: Mapping = {}, inputs: Any = None, **more: Any) -> Tiny:
    """A model of transformers that holds a vision and a text tower."""
    text_config = {**TEXT, **text}
    return Tiny(
        lambda: getattr(hf, model)(getattr(hf, config)(text_config=text_config, vision_config=VISION, **more)),
        inputs or images_and_text(),
        text=inputs is None,
    )


def _from(
    package: str,
    make: Callable[[Any], nn.Module],
    name: str = "x",
    other: Any = (),
    shape: Any = None,
    single: bool = False,
) -> Tiny:
    """A model of an optional package, imported when it is built."""
    other = tuple(named(name, inputs) for inputs in other)
    return Tiny(lambda: make(_imported(package)), named(name, shape or images()), other, single=single)


def _imported(package: str) -> Any:
    if package.startswith("clip."):  # it asks an old setuptools for packaging
        sys.modules.setdefault("pkg_resources", SimpleNamespace(packaging=packaging))  # type: ignore[arg-type]
    pytest.importorskip(package.split(".")[0])
    return importlib.import_module(package)


SMALL = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": CHANNELS, "depth": BLOCKS, "num_heads": 4}


def _timm(**settings: Any) -> Tiny:
    settings = {**SMALL, "mlp_ratio": 1.5, "num_classes": 5, **settings}
    other = ANY_SIZE if settings.get("dynamic_img_size") else ()
    return _from("timm.models.vision_transformer", lambda timm: timm.VisionTransformer(**settings), other=other)


def _eva(**settings: Any) -> Tiny:
    settings = {**SMALL, "mlp_ratio": 1.5, "num_classes": 5, "use_rot_pos_emb": True, **settings}
    other = ANY_SIZE if settings.get("dynamic_img_size") else ()
    return _from("timm.models.eva", lambda timm: timm.Eva(**settings), other=other)


def _open_clip(**settings: Any) -> Tiny:
    settings = {
        "image_size": SIZE, "patch_size": PATCH, "width": CHANNELS, "layers": BLOCKS, "heads": 4, "mlp_ratio": 1.5,
        "output_dim": 16, **settings,
    }  # fmt: skip
    return _from("open_clip.transformer", lambda open_clip: open_clip.VisionTransformer(**settings))


def _whole_open_clip(open_clip: Any) -> nn.Module:
    vision = {"image_size": SIZE, "patch_size": PATCH, "width": CHANNELS, "layers": BLOCKS, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": CHANNELS, "heads": 4, "layers": 2}
    return open_clip.CLIP(16, vision, text)


RELATIVE = {"use_relative_position_bias": True, "drop_path_rate": 0.0}
SHARED = {"use_shared_relative_position_bias": True, "drop_path_rate": 0.0}
REGISTERS = {"num_register_tokens": 4, "pos_embed_rescale": None}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NECK = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
WRAPPED = {"embed_dim": CHANNELS, "depth": BLOCKS, "num_heads": 4, "mlp_ratio": 1.5, "patch_size": PATCH}


def _hidden(
    package: str,
    model: str,
    config: str,
    inputs: Any = None,
    other: Any = (),
    single: bool = False,
    **settings: Any,
) -> Tiny:
    """A class of transformers that it does not export."""
    module = f"transformers.models.{package}.modeling_{package}"
    settings = {**VISION, **settings}

    def make() -> nn.Module:
        code = importlib.import_module(module)
        return getattr(code, model)(getattr(code, config)(**settings))

    return Tiny(make, inputs or images(), other, single=single)


def _vision(package: str, name: str, inputs: Any, other: Any = ()) -> Tiny:
    return _hidden(package, f"{name}VisionTransformer", f"{name}VisionConfig", inputs, other)


def _timm_wrapper(model: type, **more: Any) -> nn.Module:
    _imported("timm")
    settings = {**WRAPPED, "img_size": SIZE}
    return model(hf.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=settings, **more))


def _original(name: str, *args: Any, inputs: Any = None, **settings: Any) -> Tiny:
    """A stand-in for a model in its makers' own code."""
    return Tiny(lambda: getattr(originals, name)(*args, **settings), inputs or named("x", images()))


def _openai_clip(clip: Any) -> nn.Module:
    return clip.VisionTransformer(SIZE, PATCH, CHANNELS, BLOCKS, 4, 16)


def _radio(timm: Any) -> nn.Module:
    return originals.radio(timm.VisionTransformer(**SMALL, mlp_ratio=1.5, num_classes=0))


def _naflex(**settings: Any) -> Tiny:
    config = {"patch_size": PATCH, "embed_dim": CHANNELS, "depth": BLOCKS, "num_heads": 4, "mlp_ratio": 1.5, **settings}
    return _from(
        "timm.models.naflexvit",
        lambda timm: timm.NaFlexVit(timm.NaFlexVitCfg(**config, global_pool="avg"), num_classes=5, img_size=SIZE),
    )


def with_alpha(batch: int) -> dict[str, Tensor]:
    """Images, and where to look in them."""
    alpha = torch.rand(64, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    return {"x": images()(batch)["pixel_values"], "alpha": alpha[:batch]}


def _images_to_mask(ratio: float) -> Callable[[int], dict[str, Any]]:
    return lambda batch: {"imgs": images()(batch)["pixel_values"], "mask_ratio": ratio}


def clips_with_time_third(batch: int) -> dict[str, Tensor]:
    return {"x": clips(batch).transpose(1, 2)}


RADIO = {
    "hidden_size": CHANNELS, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "mlp_ratio": 1.5,
    "patch_size": PATCH, "max_img_size": SIZE, "num_cls_tokens": 3, "num_registers": 5, "summary_idxs": [0, 2],
}  # fmt: skip

GATED = {"use_swiglu_ffn": True, "mlp_ratio": 2.25}  # two thirds of that

MODELS: Mapping[str, Mapping[str, Tiny]] = {
    "vit": {
        "ViTModel": _tiny("ViTModel", "ViTConfig", other=INTERPOLATED),
        "ViTForImageClassification": _tiny(
            "ViTForImageClassification", "ViTConfig", other=INTERPOLATED, num_labels=5
        ),
    },
    "deit": {
        "DeiTModel": _tiny("DeiTModel", "DeiTConfig", other=INTERPOLATED),
        "DeiTForImageClassification": _tiny("DeiTForImageClassification", "DeiTConfig", num_labels=5),
    },
    "vit-msn": {"ViTMSNModel": _tiny("ViTMSNModel", "ViTMSNConfig", other=INTERPOLATED)},
    "vit-mae": {
        "ViTMAEModel": _tiny("ViTMAEModel", "ViTMAEConfig", shuffled, mask_ratio=0.0),
        "ViTMAEForPreTraining": _tiny(
            "ViTMAEForPreTraining", "ViTMAEConfig", shuffled, mask_ratio=0.75, decoder_hidden_size=CHANNELS,
            decoder_num_attention_heads=4, decoder_num_hidden_layers=2, decoder_intermediate_size=NEURONS,
        ),
    },
    "ijepa": {
        "IJepaModel": _tiny("IJepaModel", "IJepaConfig", other=INTERPOLATED),
        "IJepaForImageClassification": _tiny("IJepaForImageClassification", "IJepaConfig", num_labels=5),
    },
    "dinov2": {
        "Dinov2Model": _dinov2("Dinov2Model"),
        "Dinov2Model-SwiGLU": _dinov2("Dinov2Model", use_swiglu_ffn=True),
        "Dinov2Backbone": _dinov2("Dinov2Backbone", out_features=["stage2", "stage3"]),
        "Dinov2ForImageClassification": _dinov2("Dinov2ForImageClassification", num_labels=5),
    },
    "dinov2-with-registers": {
        "Dinov2WithRegistersModel": _dinov2("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
        "Dinov2WithRegistersModel-SwiGLU": _dinov2(
            "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", use_swiglu_ffn=True
        ),
        "Dinov2WithRegistersBackbone": _dinov2(
            "Dinov2WithRegistersBackbone", "Dinov2WithRegistersConfig", out_features=["stage1", "stage3"]
        ),
    },
    "dinov3": {
        "DINOv3ViTModel": _tiny("DINOv3ViTModel", "DINOv3ViTConfig", other=ANY_SIZE, **REGISTERS),
        "DINOv3ViTModel-gated": _tiny(
            "DINOv3ViTModel", "DINOv3ViTConfig", other=ANY_SIZE, pos_embed_rescale=None, use_gated_mlp=True
        ),
        "DINOv3ViTBackbone": _tiny(
            "DINOv3ViTBackbone", "DINOv3ViTConfig", other=ANY_SIZE, **REGISTERS,
            out_features=["stage1", "stage3"],
        ),
    },
    "beit": {
        "BeitModel-absolute": _tiny(
            "BeitModel", "BeitConfig", drop_path_rate=0.0, use_absolute_position_embeddings=True
        ),
        "BeitModel-relative": _tiny("BeitModel", "BeitConfig", **RELATIVE, other=INTERPOLATED),
        "BeitModel-shared": _tiny("BeitModel", "BeitConfig", **SHARED, other=INTERPOLATED),
        "BeitModel-both": _tiny("BeitModel", "BeitConfig", **RELATIVE | SHARED),
        "BeitBackbone": _tiny("BeitBackbone", "BeitConfig", **RELATIVE, out_features=["stage1", "stage3"]),
        "BeitForSemanticSegmentation": _tiny(
            "BeitForSemanticSegmentation", "BeitConfig", **RELATIVE, out_indices=[1, 2, 3, 4], num_labels=5,
            num_hidden_layers=4, pool_scales=[1, 2], auxiliary_channels=8,
        ),
    },
    "data2vec-vision": {
        "Data2VecVisionModel-relative": _tiny(
            "Data2VecVisionModel", "Data2VecVisionConfig", **RELATIVE, other=INTERPOLATED
        ),
        "Data2VecVisionModel-both": _tiny("Data2VecVisionModel", "Data2VecVisionConfig", **RELATIVE | SHARED),
    },
    "dpt": {
        "DPTModel": _tiny("DPTModel", "DPTConfig"),
        "DPTForDepthEstimation": _tiny(
            "DPTForDepthEstimation", "DPTConfig", **NECK, num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3]
        ),
    },
    "pixio": {"PixioModel": _dinov2("PixioModel", "PixioConfig", n_cls_tokens=3)},
    "tips-v2": {
        "Tipsv2VisionModel": _dinov2("Tipsv2VisionModel", "Tipsv2VisionConfig", num_register_tokens=2),
        "Tipsv2VisionModel-SwiGLU": _dinov2("Tipsv2VisionModel", "Tipsv2VisionConfig", use_swiglu_ffn=True),
    },
    "clip": {
        "CLIPVisionModel": _tiny("CLIPVisionModel", "CLIPVisionConfig", other=INTERPOLATED),
        "CLIPVisionModelWithProjection": _tiny(
            "CLIPVisionModelWithProjection", "CLIPVisionConfig", other=INTERPOLATED, projection_dim=16
        ),
        "CLIPModel": _two_towers("CLIPModel", "CLIPConfig", projection_dim=16),
        "CLIPForImageClassification": _two_towers(
            "CLIPForImageClassification", "CLIPConfig", inputs=images(), num_labels=5
        ),
    },
    "metaclip-2": {
        "MetaClip2VisionModel": _tiny("MetaClip2VisionModel", "MetaClip2VisionConfig", other=INTERPOLATED),
        "MetaClip2Model": _two_towers("MetaClip2Model", "MetaClip2Config", projection_dim=16),
    },
    "chinese-clip": {
        "ChineseCLIPVisionModel": _tiny("ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", other=INTERPOLATED),
        "ChineseCLIPModel": _two_towers("ChineseCLIPModel", "ChineseCLIPConfig", NO_DROPOUT, projection_dim=16),
    },
    "altclip": {
        "AltCLIPVisionModel": _tiny("AltCLIPVisionModel", "AltCLIPVisionConfig", other=INTERPOLATED),
        "AltCLIPModel": _two_towers(
            "AltCLIPModel", "AltCLIPConfig", {**NO_DROPOUT, "project_dim": CHANNELS}, projection_dim=16
        ),
    },
    "clipseg": {
        "CLIPSegVisionModel": _tiny("CLIPSegVisionModel", "CLIPSegVisionConfig", other=INTERPOLATED),
        "CLIPSegForImageSegmentation": _two_towers(
            "CLIPSegForImageSegmentation", "CLIPSegConfig", inputs=images_and_text(), projection_dim=16,
            extract_layers=[0, 1, 2], reduce_dim=16, decoder_num_attention_heads=4, decoder_intermediate_size=NEURONS,
        ),
    },
    "owlvit": {
        "OwlViTVisionModel": _tiny("OwlViTVisionModel", "OwlViTVisionConfig", other=INTERPOLATED),
        "OwlViTForObjectDetection": _two_towers(
            "OwlViTForObjectDetection", "OwlViTConfig", inputs=images_and_text(), projection_dim=CHANNELS
        ),
    },
    "owlv2": {
        "Owlv2VisionModel": _tiny("Owlv2VisionModel", "Owlv2VisionConfig", other=INTERPOLATED),
        "Owlv2ForObjectDetection": _two_towers(
            "Owlv2ForObjectDetection", "Owlv2Config", inputs=images_and_text(), projection_dim=CHANNELS
        ),
    },
    "mlcd": {"MLCDVisionModel": _tiny("MLCDVisionModel", "MLCDVisionConfig")},
    "git": {"GitVisionModel": _tiny("GitVisionModel", "GitVisionConfig", other=INTERPOLATED)},
    "kosmos-2": {"Kosmos2VisionTransformer": _vision("kosmos2", "Kosmos2", images(), INTERPOLATED)},
    "siglip": {
        "SiglipVisionModel": _tiny("SiglipVisionModel", "SiglipVisionConfig", other=INTERPOLATED),
        "SiglipVisionModel-no-head": _tiny("SiglipVisionModel", "SiglipVisionConfig", vision_use_head=False),
        "SiglipModel": _two_towers("SiglipModel", "SiglipConfig"),
        "SiglipForImageClassification": _two_towers(
            "SiglipForImageClassification", "SiglipConfig", inputs=images(), num_labels=5
        ),
    },
    "janus": {
        "JanusVisionModel": Tiny(
            lambda: hf.JanusVisionModel(
                hf.JanusVisionConfig(**{**VISION, "mlp_ratio": 1.5, "projection_dim": CHANNELS, "depth": 1})
            ),
            images(),
            INTERPOLATED,
        )
    },
    "siglip2": {
        "Siglip2VisionModel": _tiny("Siglip2VisionModel", "Siglip2VisionConfig", padded, num_patches=16),
        "Siglip2ForImageClassification": Tiny(
            lambda: hf.Siglip2ForImageClassification(
                hf.Siglip2Config(text_config=TEXT, vision_config={**VISION, "num_patches": 16}, num_labels=5)
            ),
            padded,
        ),
    },
    "idefics2": {"Idefics2VisionTransformer": _vision("idefics2", "Idefics2", part_masked)},
    "idefics3": {"Idefics3VisionTransformer": _vision("idefics3", "Idefics3", part_masked)},
    "smolvlm": {"SmolVLMVisionTransformer": _vision("smolvlm", "SmolVLM", part_masked)},
    "blip": {"BlipVisionModel": _tiny("BlipVisionModel", "BlipVisionConfig", other=INTERPOLATED)},
    "blip-2": {"Blip2VisionModel": _tiny("Blip2VisionModel", "Blip2VisionConfig", other=INTERPOLATED)},
    "instructblip": {
        "InstructBlipVisionModel": _tiny("InstructBlipVisionModel", "InstructBlipVisionConfig", other=INTERPOLATED)
    },
    "aimv2": {
        "Aimv2VisionModel": _tiny("Aimv2VisionModel", "Aimv2VisionConfig"),
        "Aimv2VisionModel-native": _tiny("Aimv2VisionModel", "Aimv2VisionConfig", is_native=True, other=ANY_SIZE),
        "Aimv2Model": _two_towers("Aimv2Model", "Aimv2Config", projection_dim=16),
    },
    "internvl": {"InternVLVisionModel": _tiny("InternVLVisionModel", "InternVLVisionConfig")},
    "videomae": {
        "VideoMAEModel": _tiny(
            "VideoMAEModel", "VideoMAEConfig", lambda batch: {"pixel_values": clips(batch)}, num_frames=4
        )
    },
    "vjepa2": {
        "VJEPA2Model": Tiny(
            lambda: hf.VJEPA2Model(
                hf.VJEPA2Config(
                    patch_size=PATCH, crop_size=SIZE, frames_per_clip=4, hidden_size=48, num_attention_heads=4,
                    num_hidden_layers=BLOCKS, mlp_ratio=1, pred_hidden_size=48, pred_num_attention_heads=4,
                    pred_num_hidden_layers=2, pred_mlp_ratio=1,
                )
            ),
            lambda batch: {"pixel_values_videos": clips(batch), "skip_predictor": True},
        )
    },
    "timm-vit": {
        "timm.VisionTransformer": _timm(),
        "timm.VisionTransformer-dynamic": _timm(global_pool="avg", reg_tokens=2, dynamic_img_size=True),
        "timm.VisionTransformer-map": _timm(global_pool="map", class_token=False, qk_norm=True),
        "timm.VisionTransformer-pre-norm": _timm(pre_norm=True, num_classes=0, init_values=0.5),
        "timm.VisionTransformer-radio": _from("timm.models.vision_transformer", _radio),
        "TimmWrapperModel": Tiny(lambda: _timm_wrapper(hf.TimmWrapperModel), images()),
        "TimmWrapperForImageClassification": Tiny(
            lambda: _timm_wrapper(hf.TimmWrapperForImageClassification, num_labels=5), images()
        ),
    },
    "timm-eva": {
        "timm.Eva": _eva(),
        "timm.Eva-dynamic": _eva(num_reg_tokens=2, dynamic_img_size=True, swiglu_mlp=True, qkv_fused=False),
        "timm.Eva-mixed": _eva(rope_type="mixed", global_pool="token"),
    },
    "open-clip": {
        "open_clip.VisionTransformer": _open_clip(),
        "open_clip.VisionTransformer-tokens": _open_clip(output_tokens=True, pool_type="avg", no_ln_pre=True),
        "open_clip.VisionTransformer-pooler": _open_clip(attentional_pool=True, attn_pooler_heads=4),
        "open_clip.VisionTransformer-custom": _open_clip(qk_norm=True, scale_fc=True),
        "open_clip.CLIP": _from("open_clip.model", _whole_open_clip, "image"),
    },
    "torchvision-vit": {
        "torchvision.VisionTransformer": _from(
            "torchvision.models.vision_transformer",
            lambda torchvision: torchvision.VisionTransformer(SIZE, PATCH, BLOCKS, 4, CHANNELS, NEURONS, num_classes=5),
        )
    },
    "timm-naflex": {
        "timm.NaFlexVit": _naflex(),
        "timm.NaFlexVit-rope": _naflex(pos_embed="none", rope_type="axial", class_token=True, reg_tokens=2),
    },
    "ovis2": {
        "Ovis2VisionModel": _hidden(
            "ovis2", "Ovis2VisionModel", "Ovis2VisionConfig", vocab_size=16, num_visual_indicator_tokens=4,
            hidden_stride=1, single=True,
        )
    },
    "radio": {
        "RadioModel": Tiny(lambda: hf.RadioModel(hf.RadioConfig(**RADIO)), images(), ANY_SIZE),
        "RadioModel-SwiGLU": Tiny(lambda: hf.RadioModel(hf.RadioConfig(**RADIO | GATED)), images()),
    },
    "openai-clip": {
        "clip.VisionTransformer": _from("clip.model", _openai_clip, single=True),
        "alpha_clip.VisionTransformer": _original("_AlphaClip", inputs=with_alpha),
    },
    "perception-encoder": {
        "pe.VisionTransformer": _original("_Perception"),
        "pe.VisionTransformer-no-class-token": _original("_Perception", use_cls_token=False),
        "pe.VisionTransformer-no-rope": _original("_Perception", use_rope2d=False),
    },
    "eva-clip": {
        "EVAVisionTransformer": _original("EVAVisionTransformer"),
        "EVAVisionTransformer-biased": _original("EVAVisionTransformer", "mlp", rope=False, biased=True),
    },
    "dinov2-hub": {
        "dinov2.DinoVisionTransformer": _original("DinoVisionTransformer"),
        "dinov2.DinoVisionTransformer-registers": _original("DinoVisionTransformer", 4, "gated w1 w2 w3"),
        "dinov2.DinoVisionTransformer-chunks": _original("DinoVisionTransformer", chunks=3),
        "DepthAnythingV2": _original("DepthAnythingV2"),
    },
    "dinov3-hub": {
        "dinov3.DinoVisionTransformer": _original("_DinoV3"),
        "dinov3.DinoVisionTransformer-storage": _original("_DinoV3", 4, "gated w1 w2 w3"),
    },
    "internvit": {"InternVisionModel": _original("InternVisionModel", inputs=images())},
    "aimv2-apple": {"AIMv2VisionEncoder": _original("AIMv2VisionEncoder")},
    "jepa": {
        "ijepa.VisionTransformer": _original("_IJepa"),
        "vjepa2.VisionTransformer": _original("_VJepa2", inputs=clips_with_time_third),
        "vjepa2.VisionTransformer-no-rope": _original("_VJepa2", "mlp", rope=False, inputs=clips_with_time_third),
    },
    "mae": {
        "MaskedAutoencoderViT": _original("MaskedAutoencoderViT", inputs=_images_to_mask(0.0)),
        "MaskedAutoencoderViT-masked": _original("MaskedAutoencoderViT", inputs=_images_to_mask(0.75)),
    },
}  # fmt: skip

ROWS: Mapping[str, Tiny] = {name: tiny for rows in MODELS.values() for name, tiny in rows.items()}
FIRST = tuple(next(iter(rows)) for rows in MODELS.values())  # one model per family, for what takes long


def pixels(inputs: Mapping[str, Any]) -> str:
    """The argument that holds the images."""
    return next(name for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point())
