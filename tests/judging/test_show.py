"""The picture before and after, and the hooks that it looks through, against transformers' own outputs."""

import sys

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModel

import testreg
from testreg import RegisterPlan, UnsupportedModel
from testreg.finding.observe import observe, run, unpatched
from testreg.finding.places import grid
from testreg.judging.pictures import clearest_block, show, views
from testreg.runtime.errors import BadPlan
from testreg.runtime.towers import find_tower

PLAN = RegisterPlan({1: (3, 5)}, registers=2)
PIXELS = zoo.images()(3)["pixel_values"]
TOWERS = (
    "ViTModel",
    "DeiTModel",
    "Dinov2Model",
    "Dinov2WithRegistersModel",
    "DINOv3ViTModel",
    "IJepaModel",
    "CLIPVisionModel",
    "SiglipVisionModel",
)
OTHERS = ("timm.VisionTransformer", "timm.Eva", "open_clip.VisionTransformer", "torchvision.VisionTransformer")


@pytest.fixture(params=TOWERS)
def model(request):
    return zoo.build(request.param)[0]


def eager(model, inputs):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = find_tower(model).module(**inputs, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    return output


def same_outputs(model, inputs, before):
    after = zoo.tensors(run(model, inputs))
    return all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("patched", [False, True])
def test_views_are_what_the_model_itself_reports(model, patched):
    inputs = {"pixel_values": PIXELS}
    tower = find_tower(model)
    if patched:
        testreg.patch(model, PLAN)
    output = eager(model, inputs)
    for index, view in enumerate(views(model, inputs)):
        for block in range(len(tower.blocks) - 1):  # after the last one, some models report the normed state
            norms = output.hidden_states[block + 1][index, tower.prefix :].norm(dim=-1)
            torch.testing.assert_close(view.norms[block].flatten(), norms)
        attention = output.attentions[-1][index].mean(0)
        rows = attention[:1] if tower.prefix else attention
        torch.testing.assert_close(view.attention.flatten(), rows[:, tower.prefix :].mean(0))
        assert view.registers == pytest.approx(1 - float(rows.sum(-1).mean()), abs=1e-6)
        assert (view.registers > 0.01) == patched


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_other_libraries_give_maps_too(name):
    model, _ = zoo.build(name)
    inputs = {"pixel_values": PIXELS}
    before = run(model, inputs)
    fused = [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]
    for view in views(model, inputs):
        prefix = find_tower(model).prefix
        assert view.attention.shape == (4, 4)
        assert view.attention.sum() < 1 if prefix else view.attention.sum() == pytest.approx(1, abs=1e-5)
        assert view.registers == pytest.approx(0, abs=1e-5)
    with testreg.patch(model, PLAN):
        assert all(view.registers > 0.01 for view in views(model, inputs))
    assert torch.equal(run(model, inputs), before)
    assert fused == [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]


def test_timms_maps_are_those_of_its_own_extractor():
    timm = pytest.importorskip("timm.utils")
    model, _ = zoo.build("timm.VisionTransformer")
    (view,) = views(model, {"pixel_values": PIXELS[:1]})
    for block in model.blocks:
        block.attn.fused_attn = False
    maps = timm.AttentionExtract(model, names=["blocks.2.attn.attn_drop"], method="hook")(PIXELS[:1])
    torch.testing.assert_close(view.attention.flatten(), next(iter(maps.values()))[0].mean(0)[0, 1:])


def test_views_of_photos_that_are_not_square_keep_their_rows(model):
    inputs = {"pixel_values": torch.randn(1, 3, 24, 40)}
    (view,) = views(model, inputs)
    assert view.norms.shape[1:] == view.attention.shape == (3, 5)


def test_keys_are_those_of_the_unpatched_tokens_until_the_registers_join(model):
    inputs, plan = {"pixel_values": PIXELS}, RegisterPlan({}, registers=3, entry=1, state=torch.ones(zoo.CHANNELS))
    tower = find_tower(model)
    with observe(model, keys=[0, 1, 2], states=[0]) as before:
        run(model, inputs)
    with testreg.patch(model, plan), observe(model, keys=[0, 1, 2]) as after:
        run(model, inputs)
    for block in (0, 1):  # the registers change what tokens become only within block 1
        torch.testing.assert_close(before.keys[block], after.keys[block])
    assert before.keys[2].shape == after.keys[2].shape
    assert not torch.allclose(before.keys[2], after.keys[2], atol=1e-4)
    normed = next(part for name, part in tower.blocks[1].named_modules() if "norm" in name)(before.states[0])
    expected = next(part for name, part in tower.attentions[1].named_modules() if name.endswith("k_proj"))(normed)
    torch.testing.assert_close(before.keys[1], expected)


@pytest.mark.parametrize("already", [False, True])
def test_the_model_is_as_it_was_afterwards(model, already):
    inputs = {"pixel_values": PIXELS}
    if already:
        current = testreg.patch(model, RegisterPlan({2: (7,)}, registers=1))
    before = zoo.tensors(run(model, inputs))
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    show(model, PLAN, PIXELS)
    assert same_outputs(model, inputs, before)
    assert testreg.active(model) is (current if already else None)
    assert model.config._attn_implementation == "sdpa"
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_the_model_is_as_it_was_after_an_error_too():
    model, inputs = zoo.build("ViTModel")
    ends = model.layernorm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        show(model, PLAN, torch.randn(1, 3, 32, 32))
    ends.remove()
    assert model.config._attn_implementation == "sdpa"
    assert testreg.active(model) is None
    assert same_outputs(model, inputs, zoo.tensors(zoo.build("ViTModel")[0](**inputs)))


def test_before_is_without_any_patch_and_after_is_with_the_plan():
    model, inputs = zoo.build("ViTModel")
    plain = views(model, inputs)
    with testreg.patch(model, PLAN):
        patched = views(model, inputs)
        with unpatched(model):
            torch.testing.assert_close(views(model, inputs)[0].norms, plain[0].norms, rtol=0, atol=0)
        figure = show(model, None, inputs["pixel_values"])
    panels = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    block = clearest_block(plain)
    assert len(panels) == 5 * len(plain)
    for row, (before, after) in enumerate(zip(plain, patched, strict=True)):
        expected = before.norms[block], after.norms[block], before.attention, after.attention
        for panel, tensor in zip(panels[5 * row + 1 : 5 * row + 5], expected, strict=True):
            assert torch.equal(torch.as_tensor(panel), tensor)


def test_the_pair_of_norm_maps_shares_one_scale():
    model, _ = zoo.build("ViTModel")
    figure = show(model, PLAN, PIXELS)
    scales = {id(axes.images[0].norm) for axes in figure.axes if axes.images and "median" in axes.get_xlabel()}
    assert len(scales) == 1


def words(figure):
    return " | ".join(text.get_text() for text in figure.texts)


def test_the_picture_says_what_it_shows(tmp_path):
    with_class, without = zoo.build("ViTModel")[0], zoo.build("SiglipVisionModel")[0]
    figure = show(with_class, PLAN, PIXELS, title="my model")
    for text in ("my model", str(PLAN), "patch norms after block", "class-token attention", "before", "after"):
        assert text in words(figure)
    assert "class-token" not in words(show(without, PLAN, PIXELS))
    assert "each patch receives" in words(show(without, PLAN, PIXELS))
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_at_most_twelve_photos_are_drawn():
    figure = show(zoo.build("ViTModel")[0], PLAN, zoo.images()(20)["pixel_values"])
    assert sum(bool(axes.images) for axes in figure.axes) == 5 * 12


def test_without_a_plan_there_is_nothing_to_draw():
    with pytest.raises(BadPlan, match="plan="):
        show(zoo.build("ViTModel")[0], None, PIXELS)


def test_the_clearest_block_is_where_one_patch_stands_out():
    view = views(zoo.build("ViTModel")[0], {"pixel_values": PIXELS})[0]
    view.norms[:] = 1
    view.norms[1, 2, 3] = 50
    view.norms[2] = 100  # all large: nothing stands out
    assert clearest_block([view]) == 1


@given(st.integers(1, 60), st.integers(1, 60), st.integers(4, 32), st.integers(0, 3), st.integers(0, 3))
def test_grid_finds_the_rows_and_columns_that_a_convolution_makes(rows, columns, size, more_rows, more_columns):
    height, width = rows * size + min(more_rows, size // 8), columns * size + min(more_columns, size // 8)
    assert grid(height, width, rows * columns) == (rows, columns)


@pytest.mark.parametrize(("height", "width", "patches"), [(224, 224, 195), (224, 224, 98), (64, 64, 13)])
def test_what_is_no_grid_is_refused(height, width, patches):
    with pytest.raises(UnsupportedModel, match="grid"):
        grid(height, width, patches)


def test_on_the_real_checkpoint_the_bright_corners_go(assets):
    model = AutoModel.from_pretrained(assets / "checkpoints" / "vit-tiny-augreg").eval()
    fc2 = load_file(assets / "checkpoints" / "vit-tiny-augreg" / "model.safetensors")
    column = next(fc2[name] for name in fc2 if "layer.7.output.dense.weight" in name)[:, 417]
    state = column / column.norm() * 470  # what the register neuron writes is nearly all of the outliers' state
    plan = RegisterPlan({7: (417,), 6: (59, 189)}, registers=4, entry=8, state=state)
    photos = [assets / "images" / "coco_cc" / "images" / f"0000000000{number}.jpg" for number in (30, 72)]
    figure = show(model, plan, photos)
    panels = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    for row in range(2):
        photo, before, after = panels[5 * row : 5 * row + 3]
        assert photo.shape == (224, 224, 3)
        assert 0 <= photo.min() < photo.max() <= 1
        assert before.max() > 400
        assert after.max() < 40
        assert min(before[0, 0], before[0, -1], before[-1, 0], before[-1, -1]) > 100
    assert "after block 7" in words(figure)
    assert "vit-tiny-augreg" in words(figure)
