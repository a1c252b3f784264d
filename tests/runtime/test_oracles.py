"""The patch against code that nobody here wrote: architectures with native registers, and attention without them."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from zoo import CHANNELS, DINO, ROWS, SMALL, VISION, attention, build, images, padded, part_masked, scale, tensors

from testreg import RegisterPlan, patch
from testreg.testing import check_hidden_registers


def run(model: nn.Module, inputs: dict | Tensor, **more) -> dict[str, Tensor]:
    with torch.no_grad():
        return tensors(model(**inputs, **more) if isinstance(inputs, dict) else model(inputs, **more))


def close(found: Tensor, wanted: Tensor, at: str = "") -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=lambda message: f"{at}: {message}")


def values(registers: int, kind: str) -> Tensor:
    state = torch.randn(registers, CHANNELS, generator=torch.Generator().manual_seed(5))
    return torch.zeros_like(state) if kind == "zeros" else state


def plan(registers: int, kind: str) -> RegisterPlan:
    return RegisterPlan({}, registers=registers, state=None if kind == "zeros" else values(registers, kind))


KINDS = pytest.mark.parametrize("kind", ["zeros", "values"])
COUNTS = pytest.mark.parametrize("registers", [1, 4])


@pytest.mark.parametrize("swiglu", [False, True])
@COUNTS
@KINDS
def test_dinov2_equals_dinov2_with_registers(swiglu, registers, kind):
    model, inputs = build("Dinov2Model-SwiGLU" if swiglu else "Dinov2Model")
    config = hf.Dinov2WithRegistersConfig(**DINO, use_swiglu_ffn=swiglu, num_register_tokens=registers)
    oracle = hf.Dinov2WithRegistersModel(config).eval()
    missing, unexpected = oracle.load_state_dict(model.state_dict(), strict=False)
    assert (missing, unexpected) == (["embeddings.register_tokens"], [])
    oracle.embeddings.register_tokens.data.copy_(values(registers, kind))
    wanted = run(oracle, inputs, output_hidden_states=True)
    with patch(model, plan(registers, kind)) as patched, patched.recording() as record:
        found = run(model, inputs, output_hidden_states=True)
    for path, tensor in wanted.items():
        if tensor.ndim == 3:  # [class | registers | patches]
            tensor = torch.cat([tensor[:, :1], tensor[:, 1 + registers :]], 1)
        close(found[path], tensor)
    close(record.registers[2], wanted["hidden_states.3"][:, 1 : 1 + registers])


@COUNTS
@KINDS
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_dinov3_equals_dinov3_with_more_registers(registers, kind, size):
    def make(more: int) -> nn.Module:
        return hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VISION, num_register_tokens=2 + more)).eval()

    model, oracle, inputs = make(0), make(registers), images(*size)(2)
    scale(model)
    weights = model.state_dict()
    own = weights["embeddings.register_tokens"]
    weights["embeddings.register_tokens"] = torch.cat([values(registers, kind)[None], own], 1)
    oracle.load_state_dict(weights)
    wanted = run(oracle, inputs)
    with patch(model, plan(registers, kind)):
        found = run(model, inputs)
    close(found["pooler_output"], wanted["pooler_output"])
    tokens = wanted["last_hidden_state"]  # [class | registers | own registers | patches]
    close(found["last_hidden_state"], torch.cat([tokens[:, :1], tokens[:, 1 + registers :]], 1))


@COUNTS
@KINDS
@pytest.mark.parametrize("kind_of_model", ["vit", "eva", "eva-mixed"])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_timm_equals_timm_with_native_registers(registers, kind, kind_of_model, pool):
    pytest.importorskip("timm")
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    settings = {**SMALL, "global_pool": pool, "no_embed_class": True, "num_classes": 5}

    def make(count: int) -> nn.Module:
        if kind_of_model == "vit":
            return VisionTransformer(**settings, reg_tokens=count).eval()
        kind_of_rope = "mixed" if kind_of_model == "eva-mixed" else "cat"
        return Eva(**settings, num_reg_tokens=count, use_rot_pos_emb=True, rope_type=kind_of_rope).eval()

    model, oracle, pixels = make(0), make(registers), images()(2)["pixel_values"]
    scale(model)
    missing, unexpected = oracle.load_state_dict(model.state_dict(), strict=False)
    assert (missing, unexpected) == (["reg_token"], [])
    oracle.reg_token.data.copy_(values(registers, kind))
    wanted = run(oracle, pixels)
    with patch(model, plan(registers, kind)):
        found = run(model, pixels)
    close(found[""], wanted[""])


# Registers that nobody attends to change nothing: then every mask, position, pooling and head is where it was.


@pytest.mark.parametrize("name", list(ROWS))
def test_registers_that_nobody_attends_to_change_nothing(name):
    model, inputs = build(name)
    for kind, given in product(("sdpa", "eager"), (inputs, *(other(2) for other in ROWS[name].other))):
        check_hidden_registers(model, given, kind)


# Padding


@pytest.mark.parametrize("name", ["Siglip2VisionModel", "Siglip2ForImageClassification"])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_padded_patches_never_win_the_maximum(name, kind):
    model, inputs = build(name, batch=4)
    attention(model, kind)
    mask = inputs["pixel_attention_mask"].bool()
    assert not mask.all()
    loud = {**inputs, "pixel_values": inputs["pixel_values"].masked_fill(~mask[..., None], 50.0)}
    with patch(model, RegisterPlan({0: (1, 5), 1: (3,), 2: (0, 40)}, registers=2)):
        for path, tensor in run(model, inputs).items():
            other = run(model, loud)[path]
            close(tensor[mask] if tensor.ndim == 3 else tensor, other[mask] if tensor.ndim == 3 else other)


@pytest.mark.parametrize("name", ["Idefics2VisionTransformer", "Idefics3VisionTransformer", "SmolVLMVisionTransformer"])
def test_masked_patches_never_win_the_maximum(name):
    model, inputs = build(name, batch=4)
    mask = inputs["patch_attention_mask"].flatten(1)
    assert not mask.all()
    patches = inputs["patch_attention_mask"].repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    loud = {**inputs, "pixel_values": inputs["pixel_values"].masked_fill(~patches, 50.0)}
    with patch(model, RegisterPlan({0: (1, 5), 1: (3,), 2: (0, 40)}, registers=2)):
        close(run(model, inputs)["last_hidden_state"][mask], run(model, loud)["last_hidden_state"][mask])


def test_the_padded_inputs_are_padded():
    assert not padded(4)["pixel_attention_mask"].all()
    assert not part_masked(4)["patch_attention_mask"].all()
