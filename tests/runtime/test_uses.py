"""In the places where people use their towers: inside other models, pipelines, generation, training, placement."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from torch import Tensor, nn
from zoo import BLOCKS, CHANNELS, DINO, NECK, NEURONS, PATCH, SIZE, VISION, build, given, images, scale, tensors

from testreg import RegisterPlan, UnsupportedModel, patch
from testreg.runtime.towers import find_tower

PLAN = RegisterPlan({0: (1, 5), 1: (3,)}, registers=2)
IMAGE_TOKEN = 60
LLAMA = hf.LlamaConfig(
    vocab_size=64, hidden_size=CHANNELS, intermediate_size=NEURONS, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
GEMMA = hf.GemmaConfig(**{**LLAMA.to_dict(), "model_type": "gemma", "head_dim": 8})
CLIP, SIGLIP = hf.CLIPVisionConfig(**VISION), hf.SiglipVisionConfig(**VISION, vision_use_head=False)


def dinov2_backbone() -> hf.PreTrainedConfig:
    return hf.Dinov2Config(**DINO | {"num_hidden_layers": 4}, out_indices=[1, 2, 3, 4], reshape_hidden_states=False)


def run(model: nn.Module, inputs: dict) -> dict[str, Tensor]:
    with torch.no_grad():
        return tensors(model(**inputs))


def seeded(make) -> tuple[nn.Module, dict]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = make()
        scale(model.eval())
    return model, inputs


def prompt(image_tokens: int, **more) -> dict:
    ids = torch.tensor([[1, *[IMAGE_TOKEN] * image_tokens, 7, 9]]).repeat(2, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images()(2), **more}


def vlm(model: str, config: str, vision, image_tokens: int, inputs: dict | None = None, text=LLAMA, **more):
    def make() -> tuple[nn.Module, dict]:
        settings = {"image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN, **more}
        built = getattr(hf, model)(getattr(hf, config)(vision_config=vision, text_config=text, **settings))
        return built, prompt(image_tokens, **(inputs or {}))

    return make


def depth_anything() -> tuple[nn.Module, dict]:
    config = hf.DepthAnythingConfig(
        backbone_config=dinov2_backbone(), patch_size=PATCH, reassemble_hidden_size=CHANNELS, head_hidden_size=8, **NECK
    )
    return hf.DepthAnythingForDepthEstimation(config), images()(2)


def dpt() -> tuple[nn.Module, dict]:
    config = hf.DPTConfig(backbone_config=dinov2_backbone(), hidden_size=CHANNELS, is_hybrid=False, **NECK)
    return hf.DPTForDepthEstimation(config), images()(2)


def zoedepth() -> tuple[nn.Module, dict]:
    backbone = hf.BeitConfig(
        **VISION | {"num_hidden_layers": 4}, out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
        use_relative_position_bias=True, drop_path_rate=0.0,
    )  # fmt: skip
    config = hf.ZoeDepthConfig(
        backbone_config=backbone, **NECK, bottleneck_features=8, bin_embedding_dim=8, num_relative_features=8,
        bin_configurations=[{"n_bins": 8, "min_depth": 0.1, "max_depth": 10.0, "name": "indoor"}],
        num_attractors=[2, 2, 2, 2],
    )  # fmt: skip
    return hf.ZoeDepthForDepthEstimation(config), images()(2)


def upernet() -> tuple[nn.Module, dict]:
    backbone = hf.Dinov2Config(**DINO, out_features=["stage1", "stage2", "stage3"])
    config = hf.UperNetConfig(
        backbone_config=backbone, hidden_size=8, pool_scales=[1, 2], num_labels=5, use_auxiliary_head=False
    )
    return hf.UperNetForSemanticSegmentation(config), images()(2)


def mask2former() -> tuple[nn.Module, dict]:
    config = hf.Mask2FormerConfig(
        backbone_config=hf.Dinov2Config(**DINO | {"num_hidden_layers": 4}, out_indices=[1, 2, 3, 4]),
        hidden_dim=32, feature_size=32, mask_feature_size=32, encoder_layers=1, decoder_layers=2, num_attention_heads=4,
        encoder_feedforward_dim=16, dim_feedforward=16, num_queries=4,
    )  # fmt: skip
    return hf.Mask2FormerForUniversalSegmentation(config), images(64, 64)(2)


def dual_encoder() -> tuple[nn.Module, dict]:
    text = hf.BertConfig(vocab_size=64, hidden_size=CHANNELS, num_hidden_layers=2, num_attention_heads=4)
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(hf.ViTConfig(**VISION), text, projection_dim=16)
    return hf.VisionTextDualEncoderModel(config), {"input_ids": torch.tensor([[1, 2, 3]] * 2), **images()(2)}


def open_clip_timm() -> tuple[nn.Module, dict]:
    pytest.importorskip("open_clip")
    model = importlib.import_module("open_clip.timm_model").TimmModel("vit_tiny_patch16_224", 16)
    return model, {"x": images(224, 224)(2)["pixel_values"]}


INTERNVL = hf.InternVLVisionConfig(**VISION)
IDEFICS3 = {**VISION, "model_type": "idefics3_vision"}
TILES = {
    "pixel_values": torch.randn(2, 2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)),
    "image_sizes": torch.tensor([[32, 32], [32, 32]]),
}
HOLDERS = {
    "depth_anything": (depth_anything, "backbone", "dinov2"),
    "dpt": (dpt, "backbone", "dinov2"),
    "zoedepth": (zoedepth, "backbone.beit", "beit"),
    "upernet": (upernet, "backbone", "dinov2"),
    "mask2former": (mask2former, "model.pixel_level_module.encoder", "dinov2"),
    "dual_encoder": (dual_encoder, "vision_model", "vit"),
    "open_clip_timm": (open_clip_timm, "trunk", "timm-vit"),
    "llava": (
        vlm("LlavaForConditionalGeneration", "LlavaConfig", CLIP, 16, vision_feature_layer=-1),
        "model.vision_tower",
        "clip",
    ),
    "llava_next": (
        vlm(
            "LlavaNextForConditionalGeneration", "LlavaNextConfig", CLIP, 36, vision_feature_layer=-1,
            image_grid_pinpoints=[[32, 32]],
            inputs=TILES,
        ),
        "model.vision_tower",
        "clip",
    ),
    "llava_onevision": (
        vlm(
            "LlavaOnevisionForConditionalGeneration", "LlavaOnevisionConfig", SIGLIP, 36, vision_feature_layer=-1,
            image_grid_pinpoints=[[32, 32]], inputs=TILES,
        ),
        "model.vision_tower",
        "siglip",
    ),
    "paligemma": (
        vlm(
            "PaliGemmaForConditionalGeneration", "PaliGemmaConfig", SIGLIP, 16, text=GEMMA, projection_dim=CHANNELS,
            inputs={"token_type_ids": torch.tensor([[0, *[0] * 16, 0, 1]] * 2)},
        ),
        "model.vision_tower",
        "siglip",
    ),
    "internvl": (
        vlm("InternVLForConditionalGeneration", "InternVLConfig", INTERNVL, 4, downsample_ratio=0.5),
        "model.vision_tower",
        "internvl",
    ),
    "idefics3": (
        vlm(
            "Idefics3ForConditionalGeneration", "Idefics3Config", IDEFICS3, 4, scale_factor=2,
            inputs={"pixel_values": images()(2)["pixel_values"][:, None]},
        ),
        "model.vision_model",
        "idefics3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("holder", list(HOLDERS))
def test_a_tower_is_found_and_patched_inside_other_models(holder):
    make, path, family = HOLDERS[holder]
    model, inputs = seeded(make)
    tower = find_tower(model)
    assert (tower.path, tower.family) == (path, family)
    before = run(model, inputs)
    with patch(model, PLAN):
        after = run(model, inputs)
    assert {key: (value.shape, value.dtype) for key, value in after.items()} == {
        key: (value.shape, value.dtype) for key, value in before.items()
    }
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(before[key], value) for key, value in run(model, inputs).items())


def test_llava_generates_through_a_patched_tower():
    model, inputs = seeded(HOLDERS["llava"][0])

    def words() -> list:
        return model.generate(
            **inputs, max_new_tokens=5, do_sample=False, output_scores=True, return_dict_in_generate=True
        )

    before = words()
    with patch(model, PLAN) as patched, patched.recording() as record:
        after = words()
    assert len(record.registers) == BLOCKS  # the tower ran, with its registers
    assert after.sequences.shape[0] == 2
    assert not torch.equal(after.scores[0], before.scores[0])
    assert torch.equal(words().scores[0], before.scores[0])


# Pipelines

PROCESSOR = {"size": {"height": SIZE, "width": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 40, 3), dtype=np.uint8))


def flat(answer) -> list[float]:
    """Every number in a pipeline's answer, in order."""
    if isinstance(answer, Tensor):
        return answer.flatten().tolist()
    if isinstance(answer, dict):
        return [number for key in sorted(answer) for number in flat(answer[key])]
    if isinstance(answer, list | tuple):
        return [number for item in answer for number in flat(item)]
    return [float(answer)] if isinstance(answer, int | float) else []


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("image-feature-extraction", "ViTModel"),
        ("image-classification", "ViTForImageClassification"),
        ("depth-estimation", "depth_anything"),
    ],
)
def test_pipelines_give_answers_of_the_same_form(task, name):
    model = seeded(depth_anything)[0] if name == "depth_anything" else build(name)[0]
    kind = hf.DPTImageProcessorPil if name == "depth_anything" else hf.ViTImageProcessorPil
    pipeline = hf.pipeline(task, model=model, image_processor=kind(**PROCESSOR))
    before = flat(pipeline(photo()))
    with patch(pipeline, PLAN):  # a pipeline may be passed instead of its model
        after = flat(pipeline(photo()))
    assert len(after) == len(before) > 0
    assert after != before
    assert flat(pipeline(photo())) == before


def test_zero_shot_classification_pipeline(tmp_path):
    model, _ = build("CLIPModel")
    pipeline = hf.pipeline(
        "zero-shot-image-classification",
        model=model,
        image_processor=hf.CLIPImageProcessorPil(**PROCESSOR),
        tokenizer=tokenizer(),
    )
    labels = ["cat", "dog", "tree"]
    before = flat(pipeline(photo(), candidate_labels=labels))
    with patch(pipeline, PLAN):
        after = flat(pipeline(photo(), candidate_labels=labels))
    assert len(after) == len(before) == 3
    assert after != before
    assert flat(pipeline(photo(), candidate_labels=labels)) == before


def tokenizer() -> hf.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {
        word: index for index, word in enumerate(["pad", "this", "is", "a", "photo", "of", "cat", "dog", "tree", "."])
    }
    made = Tokenizer(models.WordLevel({**words, "end": 63}, unk_token="pad"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A end", special_tokens=[("end", 63)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="pad", eos_token="end", model_max_length=16)


# Backbones, adapters, placement


def test_auto_backbone_keeps_its_feature_maps():
    backbone = hf.AutoBackbone.from_config(hf.Dinov2Config(**DINO, out_features=["stage2", "stage3"])).eval()
    before = backbone(**images(24, 40)(2)).feature_maps
    with patch(backbone, PLAN):
        after = backbone(**images(24, 40)(2)).feature_maps
    assert [one.shape for one in after] == [one.shape for one in before] == [(2, CHANNELS, 3, 5)] * 2


@pytest.mark.parametrize("patch_first", [True, False])
def test_a_lora_training_step_through_a_patched_model(patch_first):
    peft = pytest.importorskip("peft")
    model, inputs = build("ViTForImageClassification")
    targets = ["q_proj", "v_proj"] if patch_first else ["q_proj", "v_proj", "fc2"]
    config = peft.LoraConfig(r=2, target_modules=targets)
    plain = run(model, inputs)["logits"]
    if patch_first:
        patched = patch(model, PLAN)
        adapted = peft.get_peft_model(model, config)
    else:
        adapted = peft.get_peft_model(model, config)
        patched = patch(adapted, PLAN)
    adapted.train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.5)
    losses = []
    for _ in range(3):
        loss = adapted(**inputs, labels=torch.tensor([1, 3])).loss
        loss.backward()
        assert any(p.grad.abs().sum() > 0 for name, p in adapted.named_parameters() if "lora_B" in name)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    seen = given(find_tower(model).downs[1])
    run(adapted.eval(), inputs)
    assert torch.count_nonzero(seen[0][:, PLAN.registers :, 3]) == 0  # the neurons stay silent under the adapter
    patched.remove()
    with adapted.disable_adapter():
        assert torch.equal(run(adapted, inputs)["logits"], plain)


@pytest.mark.parametrize("patch_first", [True, False])
def test_a_model_that_accelerate_places_keeps_its_registers(patch_first):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = build("ViTModel")
    plain = run(model, inputs)
    with patch(model, PLAN):
        wanted = run(model, inputs)
    patched = patch(model, PLAN) if patch_first else None
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in offloaded.layers.parameters())  # until they are needed
    patched = patched or patch(offloaded, PLAN)
    found = run(offloaded, inputs)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    patched.remove()
    found = run(offloaded, inputs)
    assert all(torch.equal(found[key], plain[key]) for key in plain)


def test_from_pretrained_with_a_device_map(tmp_path):
    pytest.importorskip("accelerate")
    model, inputs = build("ViTModel")
    model.save_pretrained(tmp_path)
    with patch(model, PLAN):
        wanted = run(model, inputs)
    placed = hf.ViTModel.from_pretrained(tmp_path, device_map={"": "cpu"})
    with patch(placed, PLAN):
        found = run(placed, inputs)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_what_wraps_a_block_later_survives_the_removal():
    model, inputs = build("ViTModel")
    plain, calls = run(model, inputs), []
    patched = patch(model, PLAN)
    for block in model.layers:
        inner = block.forward
        block.forward = lambda *args, inner=inner, **more: (calls.append(1), inner(*args, **more))[1]
    run(model, inputs)
    patched.remove()
    after = run(model, inputs)
    assert all(torch.equal(after[key], plain[key]) for key in plain)
    assert len(calls) == 2 * BLOCKS
    with patch(model, PLAN):
        assert not torch.equal(run(model, inputs)["last_hidden_state"], plain["last_hidden_state"])


def test_data_parallel_is_refused_with_a_word_of_what_to_use():
    model, _ = build("ViTModel")
    with pytest.raises(UnsupportedModel, match="DistributedDataParallel"):
        patch(nn.DataParallel(model), PLAN)
