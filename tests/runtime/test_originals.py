"""Makers' own code: what is in a package for real, the rest as it is called; native register slots are the oracles."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import originals
import pytest
import torch
import zoo
from originals import CHANNELS, PATCH, SIZE
from torch import Tensor, nn
from zoo import build, images, tensors

import testreg
from testreg import RegisterPlan, TestregError, UnsupportedModel, patch
from testreg.runtime.towers import find_tower

PHOTOS = images()(4)["pixel_values"]
BOTH = pytest.mark.parametrize("kind", ["zeros", "values"])
COUNTS = pytest.mark.parametrize("registers", [1, 4])


def values(registers: int, kind: str) -> Tensor:
    state = torch.randn(registers, CHANNELS, generator=torch.Generator().manual_seed(5))
    return torch.zeros_like(state) if kind == "zeros" else state


def plan(registers: int, kind: str) -> RegisterPlan:
    return RegisterPlan({}, registers=registers, state=None if kind == "zeros" else values(registers, kind))


def scaled(model: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        zoo.scale(model.eval())
    return model


def run(call: Any, *given: Any, **more: Any) -> Any:
    with torch.no_grad():
        return call(*given, **more)


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# Native register slots


@BOTH
@COUNTS
@pytest.mark.parametrize("mlp", ["mlp", "gated w1 w2 w3"])
def test_dinov2_of_the_hub_equals_the_same_with_registers(kind, registers, mlp):
    model = scaled(originals.DinoVisionTransformer(0, mlp))
    oracle = originals.DinoVisionTransformer(registers, mlp).eval()
    assert oracle.load_state_dict(model.state_dict(), strict=False).missing_keys == ["register_tokens"]
    oracle.register_tokens.data.copy_(values(registers, kind))
    wanted = run(oracle, PHOTOS, is_training=True)
    with patch(model, plan(registers, kind)):
        found = run(model, PHOTOS, is_training=True)
        several = run(model.forward_features, [PHOTOS, PHOTOS[:1]])
        last = run(model.get_intermediate_layers, PHOTOS, 2)
    for name in ("x_norm_clstoken", "x_norm_patchtokens"):
        close(found[name], wanted[name])
        close(several[0][name], wanted[name])
        close(several[1][name], wanted[name][:1])
    close(last[-1], wanted["x_norm_patchtokens"])


@BOTH
@COUNTS
def test_dinov3_of_the_hub_equals_the_same_with_more_registers(kind, registers):
    model = scaled(originals._DinoV3(2))
    oracle = originals._DinoV3(2 + registers).eval()
    weights = model.state_dict()
    weights["storage_tokens"] = torch.cat([weights["storage_tokens"], values(registers, kind)[None]], 1)
    oracle.load_state_dict(weights)
    small = images(24, 40)(2)["pixel_values"]
    with patch(model, plan(registers, kind)):
        found, several = run(model, small, is_training=True), run(model, [PHOTOS, small])
        last = run(model.get_intermediate_layers, small)
    wanted = run(oracle, small, is_training=True)
    for name in ("x_norm_clstoken", "x_norm_patchtokens"):
        close(found[name], wanted[name])
        close(several[1][name], wanted[name])
        close(several[0][name], run(oracle, PHOTOS, is_training=True)[name])
    close(found["x_storage_tokens"], wanted["x_storage_tokens"][:, :2])
    close(last[0], wanted["x_norm_patchtokens"])


@BOTH
@COUNTS
def test_radio_in_timm_equals_the_same_with_more_registers(kind, registers):
    timm = pytest.importorskip("timm.models.vision_transformer")

    def make(more: int) -> nn.Module:
        return originals.radio(timm.VisionTransformer(**zoo.SMALL, mlp_ratio=1.5, num_classes=0), 3, 5 + more).eval()

    model, oracle = scaled(make(0)), make(registers)
    weights = model.state_dict()
    token = "model.patch_generator.token"
    weights[token] = torch.cat([weights[token], values(registers, kind)])
    oracle.load_state_dict(weights)
    assert find_tower(model).prefix == 8
    with patch(model, plan(registers, kind)):
        close(run(model, PHOTOS), run(oracle, PHOTOS))


@BOTH
@COUNTS
def test_radio_in_transformers_equals_the_same_with_more_registers(kind, registers):
    import transformers as hf

    def make(more: int) -> nn.Module:
        return hf.RadioModel(hf.RadioConfig(**{**zoo.RADIO, "num_registers": 5 + more})).eval()

    model, oracle = scaled(make(0)), make(registers)
    weights = model.state_dict()
    token = "embeddings.cls_register_token"
    weights[token] = torch.cat([weights[token], values(registers, kind)])
    oracle.load_state_dict(weights)
    with patch(model, plan(registers, kind)):
        found = run(model, PHOTOS)
    wanted = run(oracle, PHOTOS)
    close(found.summary, wanted.summary)
    close(found.features, wanted.features)


# The same weights in two packages


def clips() -> tuple[nn.Module, nn.Module]:
    """OpenAI's vision tower, and open_clip's with the same weights."""
    clip = zoo._imported("clip.model")
    open_clip = zoo._imported("open_clip.transformer")
    ours = scaled(clip.VisionTransformer(SIZE, PATCH, CHANNELS, 3, 4, 16))
    theirs = open_clip.VisionTransformer(
        SIZE, PATCH, CHANNELS, 3, 4, 4.0, output_dim=16, act_layer=open_clip.QuickGELU
    ).eval()
    assert theirs.load_state_dict(ours.state_dict(), strict=False) == ([], [])
    return ours, theirs


def plans(tower: Any) -> list[RegisterPlan]:
    neurons, channels = {0: (1, 5), 1: (3,), 2: (0, 40)}, tower.channels
    state = torch.randn(2, 3, channels, generator=torch.Generator().manual_seed(2))
    return [
        RegisterPlan(neurons, registers=2),
        RegisterPlan(neurons, registers=3, entry=1, state=state[0]),
        RegisterPlan(neurons, registers=3, entry=1, state=state),
    ]


def test_clip_equals_open_clip():
    ours, theirs = clips()
    close(run(ours, PHOTOS), run(theirs, PHOTOS))
    for wanted in plans(find_tower(ours)):
        with patch(ours, wanted), patch(theirs, wanted):
            found = run(ours, PHOTOS)
            close(found, run(theirs, PHOTOS))
        assert (found - run(ours, PHOTOS)).abs().max() > 1e-3


def test_clip_in_the_precision_that_it_is_loaded_in():
    """Weights of half precision, norms of single precision."""
    ours, _ = clips()
    for wanted in plans(find_tower(ours)):
        half = copy.deepcopy(ours)
        zoo._imported("clip.model").convert_weights(half)
        with patch(ours, wanted), patch(half, wanted):
            exact, found = run(ours, PHOTOS), run(half, PHOTOS.half())
        assert found.dtype == torch.float16
        assert (found - exact).norm() < 0.02 * exact.norm()


def test_a_whole_clip_has_its_text_left_alone():
    clip = zoo._imported("clip.model")
    model = scaled(clip.CLIP(16, SIZE, 3, 64, PATCH, 8, 64, 64, 1, 2))
    tower, text = find_tower(model), torch.tensor([[1, 5, 63, 0, 0, 0, 0, 0]])
    assert (tower.path, tower.family, tower.sequence_first) == ("visual", "openai-clip", True)
    before = run(model.encode_text, text), run(model.encode_image, PHOTOS)
    with patch(model, RegisterPlan({1: (3, 9)}, registers=2)):
        assert torch.equal(run(model.encode_text, text), before[0])
        assert not torch.equal(run(model.encode_image, PHOTOS), before[1])


def test_the_row_that_0_1_suggested_for_clip_is_right_today(monkeypatch):
    """Blocks that take tokens before images are told by their attention, whatever a row says."""
    ours, theirs = clips()
    row = testreg.Family(
        "VisionTransformer", "transformer.resblocks", "mlp.c_proj", "attn", seed="ln_pre", package="clip"
    )
    monkeypatch.setitem(testreg.FAMILIES, "openai-clip", row)
    for wanted in plans(find_tower(ours)):
        with patch(ours, wanted), patch(theirs, wanted):
            close(run(ours, PHOTOS), run(theirs, PHOTOS))


# Packages


def test_dinov2_from_its_wheel():
    """The first release, without native registers: in one list of blocks and in chunks."""
    module = pytest.importorskip("dinov2.models.vision_transformer")
    layers = pytest.importorskip("dinov2.layers")
    block = partial(layers.NestedTensorBlock, attn_class=layers.MemEffAttention)
    settings = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": CHANNELS, "depth": 3, "num_heads": 4}
    found = []
    for chunks in (0, 3):
        for kind in ("mlp", "swiglu"):
            model = module.DinoVisionTransformer(
                **settings, mlp_ratio=1.5, block_fn=block, block_chunks=chunks, ffn_layer=kind, init_values=1.0
            )
            scaled(model)
            tower = find_tower(model)
            assert (tower.family, tower.prefix, len(tower.blocks)) == ("dinov2-hub", 1, 3)
            with patch(model, RegisterPlan({1: (3, 9)}, registers=2)):
                found.append(run(model, PHOTOS))
                alone = torch.cat([run(model, photo[None]) for photo in PHOTOS])
            close(found[-1], alone)
            assert not torch.equal(found[-1], run(model, PHOTOS))


def test_timm_before_it_counted_prefix_tokens():
    timm = pytest.importorskip("timm.models.vision_transformer")
    model = scaled(timm.VisionTransformer(**zoo.SMALL))
    del model.num_prefix_tokens
    model.num_tokens = 1  # timm 0.5
    assert find_tower(model).prefix == 1
    del model.num_tokens
    with pytest.raises(UnsupportedModel, match=r"has no patch_generator\.num_skip or num_prefix_tokens or num_tokens"):
        find_tower(model)


# Wrong in silence


@pytest.mark.parametrize("form", range(3))
def test_a_fused_mlp_is_noticed(form):
    """xformers' SwiGLU reads the weights of w3 and never calls it, so nothing could rest there."""
    model = scaled(originals.DinoVisionTransformer(0, "fused w1 w2 w3"))
    with (
        patch(model, plans(find_tower(model))[form]),
        pytest.raises(
            TestregError, match=r"block 0 \(NestedTensorBlock\) ran without calling its second linear as a module"
        ),
    ):
        run(model, PHOTOS)


@pytest.mark.parametrize("form", range(3))
def test_blocks_that_are_never_called_are_noticed(form, monkeypatch):
    """A tower that goes through its blocks' parts by itself."""
    model = scaled(originals.DinoVisionTransformer())

    def unpacked(self: Any, x: Tensor) -> Tensor:
        x = self.embedded(x)
        for block in self.blocks:
            x = x + block.attn(block.norm1(x))
            x = x + block.mlp(block.norm2(x))
        return self.norm(x)[:, 0]

    monkeypatch.setattr(originals.DinoVisionTransformer, "forward", unpacked)
    with patch(model, plans(find_tower(model))[form]), pytest.raises(TestregError, match="without"):
        run(model, PHOTOS)


# Uses


def test_a_callable_rope_shared_by_all_blocks_turns_no_register():
    """Registers that join later than some blocks: the same callable is called for tokens alone before."""
    for name in ("pe.VisionTransformer", "EVAVisionTransformer"):
        model, inputs = build(name)
        before = tensors(run(model, **inputs))
        late = RegisterPlan({}, registers=2, entry=2, state=torch.zeros(CHANNELS))
        with patch(model, late):
            twin = copy.deepcopy(model)
            found = tensors(run(model, **inputs))
            close(tensors(run(twin, **inputs)), found)
        close(tensors(run(model, **inputs)), before)
        assert not torch.equal(found[""], before[""])


def test_new_tensors_between_blocks_of_several_sizes_are_refused():
    """Whose registers they have could not be told."""
    model = scaled(originals._DinoV3(2))

    def anew(module: nn.Module, args: Any, output: list[Tensor]) -> list[Tensor]:
        return [tokens.clone() for tokens in output]

    with patch(model, plan(2, "values")):
        wanted = run(model, [PHOTOS])[0]["x_norm_clstoken"]
        model.blocks[1].register_forward_hook(anew)
        close(run(model, [PHOTOS])[0]["x_norm_clstoken"], wanted)
        with pytest.raises(TestregError, match="block 2 was called without its registers"):
            run(model, [PHOTOS, PHOTOS])


def test_what_is_saved_is_the_plan(tmp_path):
    for name in ("dinov2.DinoVisionTransformer", "clip.VisionTransformer", "InternVisionModel"):
        model, inputs = build(name)
        found = RegisterPlan({1: (3, 9)}, registers=2)
        with patch(model, found):
            wanted = tensors(run(model, **inputs))
            with pytest.raises(UnsupportedModel, match="Keep the plan"):
                testreg.save(model, tmp_path / "clean")
        found.save(tmp_path / "plan.safetensors")
        with patch(build(name)[0], RegisterPlan.load(tmp_path / "plan.safetensors")) as again:
            close(tensors(run(again.tower.module, **inputs)), wanted)
