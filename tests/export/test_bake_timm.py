"""timm models as sources: the same architecture with more register slots, loaded by timm alone."""

import pytest
import torch
import transformers as hf
from bakeable import largest
from bakeable_timm import EVA, MODELS, SIZE, SMALL, build, photos, planted
from torch.nn.functional import cosine_similarity

import testreg
from testreg import RegisterPlan, UnsupportedModel
from testreg.export.bake import algebra, bake, export_stock, fit
from testreg.finding.observe import observe, run
from testreg.runtime.towers import find_tower
from testreg.testing.planting import BLOCK, NEURON

timm = pytest.importorskip("timm")


@pytest.mark.parametrize("name", MODELS)
def test_no_outliers_and_the_features_of_the_run_time_patch(name, tmp_path):
    model, plan = planted(name)
    done = export_stock(model, photos(32)[0], tmp_path / "out", plan=plan)
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
    done = bake(model.half(), plan, photos(32)[0])
    assert done.drift.outlier < 3 < 10 < done.drift.outlier_unpatched
    assert done.drift.patches >= 0.999
    built = done.stock()
    assert {weight.dtype for weight in built.parameters()} == {torch.float16}


def test_preprocessing_goes_along(tmp_path):
    model, plan = planted("vit")
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "crop_pct": 0.8}
    done = export_stock(model, photos(32)[0], tmp_path / "out", plan=plan)
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
    export_stock(model, photos(32)[0], tmp_path / "out", plan=plan, force=True)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert loaded.reg_token.shape == (1, 1, 64)
    assert torch.equal(loaded.cls_token, tower.module.cls_token)
