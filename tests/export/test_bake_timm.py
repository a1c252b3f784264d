"""timm models as sources: the same architecture with more register slots, loaded by timm alone."""

import pytest
import torch
import transformers as hf
from test_every_family import BLOCK, MARK, NEURON
from test_every_family import plant as plant_anywhere
from torch import nn
from torch.nn.functional import cosine_similarity, one_hot

import testreg
from testreg import RegisterPlan, UnsupportedModel
from testreg.export.bake import algebra, bake, export_stock, fit
from testreg.finding.observe import observe, run
from testreg.runtime.towers import find_tower

timm = pytest.importorskip("timm")

SIZE, SIDE = 64, 8
SMALL = {"img_size": SIZE, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 7}
EVA, PLAIN = "eva02_tiny_patch14_224", "vit_tiny_patch16_224"
MODELS = {
    "eva": (EVA, {}),  # fused queries, keys and values; packed SwiGLU; rotary and learnt positions
    "eva-separate": (EVA, {"qkv_fused": False, "swiglu_align_to": 8, "init_values": 0.7, "global_pool": "token"}),
    "eva-normed": (EVA, {"qkv_fused": False, "scale_mlp": True}),  # EVA-02 base and large
    "eva-inner": (EVA, {"qkv_fused": False, "scale_mlp": True, "scale_attn_inner": True}),  # those of their CLIP
    "eva-plain-normed": (EVA, {"swiglu_mlp": False, "scale_mlp": True}),
    "eva-plain": (EVA, {"swiglu_mlp": False, "num_reg_tokens": 1, "no_embed_class": True}),
    "eva-mixed": ("vit_small_patch16_rope_mixed_224", {"init_values": 0.7, "global_pool": "token"}),
    "eva-half": (
        "vit_small_patch16_rope_224",
        {"init_values": 0.7, "global_pool": "token", "rope_rotate_half": True, "dynamic_img_size": True},
    ),
    "vit": (PLAIN, {}),
    "vit-registers": (PLAIN, {"reg_tokens": 2, "global_pool": "avg", "init_values": 0.7}),
    "vit-swiglu": ("vit_giant_patch14_dinov2", {"mlp_ratio": 4, "init_values": 0.7}),
    "vit-pre-norm": ("vit_base_patch16_clip_224", {"num_classes": 0}),
    "vit-map": ("vit_base_patch16_siglip_224", {"reg_tokens": 0}),
}


def photos(count, seed=1):
    """Images with one loud patch each, and where it is, `(images, patches)`."""
    random = torch.Generator().manual_seed(seed)
    images, places = torch.randn(count, 3, SIZE, SIZE, generator=random), torch.arange(count) * 7 % SIDE**2
    for image, place in zip(images, places.tolist(), strict=True):
        row, column = 8 * (place // SIDE), 8 * (place % SIDE)
        image[:, row : row + 8, column : column + 8] = MARK
    return images, one_hot(places, SIDE**2).bool()


def build(name, **more):
    torch.manual_seed(0)
    architecture, args = MODELS[name]
    model = timm.create_model(architecture, **{**SMALL, **args, **more}).eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=(0.5 if name.endswith("fc2") else 0.8) * module.in_features**-0.5)
        if isinstance(module, nn.LayerNorm) and name.endswith(("mlp.norm", "attn.norm")):  # after training none is 1, 0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    nn.init.normal_(model.patch_embed.proj.weight, std=(3 * 8 * 8) ** -0.5)
    for tokens in (model.pos_embed, model.cls_token, model.reg_token):
        if tokens is not None:
            nn.init.normal_(tokens)
    return model


@torch.no_grad()
def planted(name, form="constant"):
    """A model with outliers, 30 times as long as other patches, and the plan that is right for it."""
    model = build(name)
    images, special = photos(32, seed=2)
    tower = find_tower(model)
    special = torch.cat([torch.zeros(len(images), tower.prefix, dtype=torch.bool), special], 1)
    plant_anywhere(model, {"x": images}, special)
    for module in tower.blocks[BLOCK].mlp.modules():
        if isinstance(module, nn.Linear) and module.in_features == tower.channels:  # LayerNorm hides this direction
            module.weight -= module.weight.mean(1, keepdim=True)
    for _ in range(2):
        with observe(model, states=[BLOCK]) as seen:
            run(model, {"pixel_values": images})
        norms = seen.states[BLOCK].norm(dim=-1)
        outliers = seen.states[BLOCK][special]
        tower.downs[BLOCK].weight[:, NEURON] *= 30 * norms.median() / outliers.norm(dim=-1).mean()
    neurons = {BLOCK: (NEURON,)}
    return model, RegisterPlan(neurons, 2, *((BLOCK + 1, outliers.mean(0)) if form == "constant" else ()))


def largest(states):
    norms = states.norm(dim=-1)
    return (norms / norms.median(1, keepdim=True).values).max()


@pytest.mark.parametrize("name", MODELS)
def test_no_outliers_and_the_features_of_the_run_time_patch(name, tmp_path):
    model, plan = planted(name)
    done = export_stock(model, photos(64)[0], tmp_path / "out", plan=plan)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    tower, slots = find_tower(model), find_tower(loaded)
    assert type(loaded) is type(model)
    assert loaded.reg_token.shape[1] == slots.prefix - (loaded.cls_token is not None)
    fresh = {"pixel_values": photos(32, seed=3)[0]}
    every = range(len(tower.blocks))
    with observe(model, states=every) as seen:
        run(model, fresh)
        before = dict(seen.states)
        with testreg.patch(model, plan):
            run(model, fresh)
    with observe(loaded, states=every) as got:
        answer = run(loaded, fresh)
    for block in every[BLOCK:]:
        assert largest(before[block][:, tower.prefix :]) > 10
        assert largest(got.states[block][:, slots.prefix :]) < 3
    wanted, have = seen.states[every[-1]][:, tower.prefix :], got.states[every[-1]][:, slots.prefix :]
    # A norm behind attention lifts the little that random queries give to registers.
    assert cosine_similarity(have, wanted, dim=-1).mean() >= (0.998 if name == "eva-inner" else 0.999)
    joined = done.registers if tower.seed is None else find_tower(done.model).seed(done.registers).detach()
    with testreg.patch(done.model, fit.slots(joined)) as acting, acting.recording() as record:
        torch.testing.assert_close(answer, run(done.model, fresh), atol=1e-5, rtol=1e-5)
    written = record.registers[BLOCK].mean((0, 1))
    assert (written - plan.state).norm() < 0.005 * plan.state.norm()


@pytest.mark.parametrize("name", [name for name in MODELS if "registers" not in name])
def test_the_pull_of_a_register_is_what_attention_does(name):
    model = build(name)
    tower = find_tower(model)
    attention = tower.attentions[0]
    inputs = {"pixel_values": photos(4)[0]}
    start = 1000 * algebra.direction(torch.randn(64, generator=torch.Generator().manual_seed(5)))
    with torch.no_grad():
        pull = fit._Oven(model, tower, torch.zeros(1), [inputs])._pull(range(1))
    through = start if tower.seed is None else tower.seed(start).detach()
    direction = algebra.direction(through)

    def outputs(registers):  # of the heads (heads, images * tokens, width)
        with fit._Tap() as tap:
            tap.input(0, getattr(attention, "norm", None) or attention.proj)
            run(model, inputs)
        tokens = tap.seen[0][:, registers:]
        return tokens.view(*tokens.shape[:2], attention.num_heads, -1).permute(2, 0, 1, 3).flatten(1, 2)

    before = outputs(0)
    with testreg.patch(model, fit.slots(through[None] * 1000)), observe(model, attentions=[0]) as seen:
        after = outputs(1)
    share = 1 - seen.attentions[0].sum(-1).transpose(0, 1).flatten(1)  # (heads, images * tokens)
    order = torch.randperm(share.shape[1], generator=torch.Generator().manual_seed(0))  # all of them are sampled
    expected = pull.log_odds(direction).sigmoid()
    torch.testing.assert_close(share[:, order].flatten(), expected, atol=1e-5, rtol=1e-3)
    change = (after - before).norm(dim=-1) / before.square().sum(-1).mean().sqrt()
    expected = expected * pull.turn(direction).sqrt()
    torch.testing.assert_close(change[:, order].flatten(), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["eva-separate", "vit"])
def test_dynamic_registers_and_half_precision(name):
    model, plan = planted(name, "dynamic")
    done = bake(model.half(), plan, photos(64)[0])
    assert done.drift.outlier < 3 < 10 < done.drift.outlier_unpatched
    assert done.drift.patches >= 0.999
    built = done.stock()
    assert {weight.dtype for weight in built.parameters()} == {torch.float16}


def test_preprocessing_goes_along(tmp_path):
    model, plan = planted("vit")
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "crop_pct": 0.8}
    done = export_stock(model, photos(64)[0], tmp_path / "out", plan=plan)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert tuple(loaded.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)
    assert loaded.pretrained_cfg["crop_pct"] == 0.8
    assert loaded.pretrained_cfg["input_size"] == (3, SIZE, SIZE)
    assert done.drift.agreement is not None


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("eva", {"use_post_norm": True}),
        ("eva", {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 2}),
        ("vit", {"qk_norm": True}),
        ("vit", {"norm_layer": "rmsnorm"}),
        ("vit", {"attn_layer": "diff"}),
    ],
)
def test_blocks_in_which_the_algebra_does_not_hold(name, more):
    model = build(name, **more)
    with pytest.raises(UnsupportedModel, match="made of weights alone"):
        bake(model, RegisterPlan({BLOCK: (NEURON,)}, 2), photos(8)[0])


def test_heads_that_pool_registers_too():
    model = build("eva", global_pool="map")
    with pytest.raises(UnsupportedModel, match="pools all tokens"):
        bake(model, RegisterPlan({BLOCK: (NEURON,)}, 2), photos(8)[0])
    model = build("vit", global_pool="avg", pool_include_prefix=True)
    with pytest.raises(UnsupportedModel, match="pools all tokens"):
        bake(model, RegisterPlan({BLOCK: (NEURON,)}, 2), photos(8)[0])


def test_a_model_of_unknown_arguments():
    model = timm.models.VisionTransformer(**SMALL).eval()
    with pytest.raises(UnsupportedModel, match=r"timm\.create_model"):
        bake(model, RegisterPlan({BLOCK: (NEURON,)}, 2), photos(8)[0])


def test_a_derived_class():
    model = timm.create_model("deit_tiny_distilled_patch16_224", **SMALL).eval()
    with pytest.raises(UnsupportedModel, match="of its own kind"):
        bake(model, RegisterPlan({BLOCK: (NEURON,)}, 2), photos(8)[0])


def test_under_the_wrapper_of_transformers(tmp_path):
    args = {name: value for name, value in SMALL.items() if name != "num_classes"}
    model = hf.TimmWrapperModel(hf.TimmWrapperConfig(architecture=EVA, model_args=args)).eval()
    tower = find_tower(model)
    state = 20 * torch.randn(64, generator=torch.Generator().manual_seed(6))
    plan = RegisterPlan({BLOCK: (NEURON,)}, 1, BLOCK + 1, state)
    export_stock(model, photos(64)[0], tmp_path / "out", plan=plan, force=True)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert loaded.reg_token.shape == (1, 1, 64)
    assert torch.equal(loaded.cls_token, tower.module.cls_token)
