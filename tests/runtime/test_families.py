"""The registry: every row is tested, towers are found inside anything, and what is not known says what to do."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import packed
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from zoo import BLOCKS, CHANNELS, MODELS, ROWS, SMALL, TEXT, VISION, build

import testreg
from docs import support
from testreg import FAMILIES, Family, RegisterPlan, UnsupportedModel, patch
from testreg.runtime.families import REFUSED
from testreg.runtime.paths import each, reach
from testreg.runtime.towers import find_tower
from testreg.testing import check_tower, norms


def test_every_family_has_tiny_models_and_every_tiny_model_a_family():
    assert set(MODELS) | set(packed.PACKED) == set(FAMILIES)
    assert set(MODELS).isdisjoint(packed.PACKED)
    assert all(MODELS.values())
    assert len(FAMILIES) >= 65


def test_every_tower_of_transformers_that_packs_its_images_is_known_or_refused():
    """Whatever has `cu_seqlens` and blocks that see."""
    known = {name for row in FAMILIES.values() for name in each(row.towers)} | set(REFUSED)
    folder, looked_at = Path(hf.__file__).parent / "models", 0
    for file in folder.glob("*/modeling_*.py"):
        text = file.read_text()
        blocks = re.search(r"^class \w*(Vision|ViT)\w*(Block|Layer)\(", text, re.MULTILINE)
        if "cu_seqlens" in text and (blocks or file.parent.name == "pixtral"):
            looked_at += 1
            classes = set(re.findall(r"^class (\w+)\(", text, re.MULTILINE))
            assert known & classes, f"{file.parent.name} has a tower that no row knows and nothing refuses"
    assert looked_at >= 25


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, rows in MODELS.items() for name in rows])
def test_the_tower_is_what_the_row_says(family, name):
    model, inputs = build(name)
    tower = find_tower(model)
    assert tower.family == family
    assert model.get_submodule(tower.path) is tower.module
    assert len(tower.downs) == len(tower.attentions) == len(tower.neurons) == len(tower.blocks) >= BLOCKS
    check_tower(model, inputs)
    assert norms(model, inputs).shape[-1] in (4, 16, 32)  # a quarter of an image, an image, a video


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, rows in packed.PACKED.items() for name in rows]
)
def test_the_packed_tower_is_what_the_row_says(family, name):
    model = packed.build(name)
    tower, grid = find_tower(model), (1, 4, 8)
    assert (tower.family, len(tower.blocks)) == (family, BLOCKS)
    shapes: list[tuple] = []
    for part in (*tower.blocks, *tower.downs):
        part.register_forward_hook(
            lambda module, args, output: shapes.append(
                (type(module), tower.batched(args[0]).shape, tower.batched(output).shape)
            )
        )
    with torch.no_grad():
        model(**packed.inputs(name, [grid]))
    assert len(shapes) == 2 * BLOCKS
    for kind, given, made in shapes:
        tokens, channels = tower.prefix + 32, tower.channels
        assert given == (1, tokens, tower.neurons[0] if kind is nn.Linear else channels)
        assert made == (1, tokens, channels)


@pytest.mark.parametrize("name", [name for name, tiny in ROWS.items() if tiny.text])
def test_a_text_tower_of_the_same_block_class_is_left_alone(name):
    model, _ = build(name)
    tower = find_tower(model)
    ours = set(map(id, tower.module.modules()))
    assert tower.path == "vision_model"
    assert not any(id(module) in ours for module in model.text_model.modules())


def test_a_tower_is_found_inside_a_pipeline_and_inside_ones_own_class():
    model, _ = build("ViTForImageClassification")

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = model.vit, nn.Linear(CHANNELS, 3)

    class Pipeline:
        def __init__(self):
            self.model = model

    class Finetuned(hf.ViTModel):
        pass

    assert find_tower(Mine()).path == "backbone"
    assert find_tower(Pipeline()).path == "vit"
    assert find_tower(Finetuned(hf.ViTConfig(**VISION))).path == ""


# What is not known


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        return self.proj(nn.functional.scaled_dot_product_attention(query, key, value))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer_attn = Attention()
        self.ffn = nn.Sequential(nn.Linear(CHANNELS, 64), nn.GELU(), nn.Linear(64, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer_attn(x)
        return x + self.ffn(x)


class HomeMade(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, CHANNELS))
        self.embed = nn.Conv2d(3, CHANNELS, 8, 8)
        self.stages = nn.Sequential(*(Layer() for _ in range(4)))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).transpose(1, 2)
        return self.stages(torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1))


def test_an_unknown_model_is_told_its_name_the_known_ones_and_a_row_that_works(monkeypatch):
    monkeypatch.setattr(testreg.runtime.families, "FAMILIES", dict(FAMILIES))
    monkeypatch.setattr(testreg, "FAMILIES", testreg.runtime.families.FAMILIES)
    torch.manual_seed(0)
    model, images = HomeMade(), torch.randn(2, 3, 32, 32)
    with pytest.raises(UnsupportedModel) as refused:
        patch(model, RegisterPlan({}))
    message = str(refused.value)
    assert message.startswith("HomeMade is of no known family (")
    assert all(name in message for name in FAMILIES)

    row = message[message.index("testreg.FAMILIES") :]
    exec(row, {"testreg": testreg})  # pasted as it is

    tower = find_tower(model)
    assert (tower.family, tower.prefix, tower.neurons) == ("my-vit", 1, (64,) * 4)
    assert tower.downs[1] is model.stages[1].ffn[2]
    assert tower.attentions[1] is model.stages[1].mixer_attn
    with torch.no_grad():
        before = model(images)
        with patch(model, RegisterPlan({1: (3, 9)}, registers=2)):
            after = model(images)
        assert after.shape == before.shape
        assert not torch.equal(after, before)
        assert torch.equal(model(images), before)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(UnsupportedModel, match="MobileNetV2Model is of no known family"):
        find_tower(hf.MobileNetV2Model(hf.MobileNetV2Config(depth_multiplier=0.25)))


STAGES = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32, "window_size": 2}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: hf.SwinModel(hf.SwinConfig(**STAGES)), "SwinModel cannot have registers: it attends inside windows"),
        (
            lambda: hf.SwinForImageClassification(hf.SwinConfig(**STAGES)),
            r"SwinForImageClassification \(in its swin, a SwinModel\) cannot have registers",
        ),
        (
            lambda: hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4)),
            "ConvNextModel cannot have registers: it is a convolutional network",
        ),
        (
            lambda: hf.SamVisionModel(hf.SamVisionConfig(**VISION, global_attn_indexes=[1], output_channels=8)),
            "a SamVisionEncoder.* cannot have registers: it attends inside windows",
        ),
        (lambda: _timm("swin_transformer").SwinTransformer(depths=(1, 1), embed_dim=8, num_heads=(2, 2)), "windows"),
        (lambda: _timm("convnext").ConvNeXt(depths=(1,) * 4, dims=(8,) * 4), "convolutional network"),
        (lambda: _timm("beit").Beit(**SMALL), "position table of fixed size"),
        (lambda: _hidden("minicpmv4_6", "MiniCPMV4_6", insert_layer_id=1), "merges its patches between two blocks"),
        (lambda: _hidden("lfm3_vl", "Lfm3Vl", layer_types=["conv", "full_attention"]), "are convolutions"),
        (
            lambda: _hidden("dots3_note", "Dots3Note", adapter_in_dim=CHANNELS, mlp_layer_types=["dense", "sparse"]),
            "choose among experts",
        ),
        (lambda: _timm("vision_transformer").VisionTransformer(**SMALL, block_fn=_parallel()), "has no mlp.fc2"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name_with_the_reason(make, says):
    with pytest.raises(UnsupportedModel, match=says):
        find_tower(make())


def _hidden(package: str, name: str, **settings) -> nn.Module:
    code = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    sizes = {**VISION, "num_hidden_layers": 2, "num_key_value_heads": 4}
    return getattr(code, f"{name}VisionModel")(getattr(code, f"{name}VisionConfig")(**sizes | settings))


def _timm(module: str):
    pytest.importorskip("timm")
    return importlib.import_module(f"timm.models.{module}")


def _parallel() -> type:
    return _timm("vision_transformer").ParallelScalingBlock


def test_a_name_is_refused_or_known_but_not_both():
    known = {name for family in FAMILIES.values() for name in each(family.towers)}
    assert known.isdisjoint(REFUSED)


def test_a_text_model_is_called_one():
    model = hf.BertModel(hf.BertConfig(**{**TEXT, "bos_token_id": None, "eos_token_id": None}))
    with pytest.raises(UnsupportedModel, match=r"BertModel is a text model, and images are for Vision Transformers"):
        find_tower(model)


def test_two_towers_are_refused_with_the_line_that_picks_one():
    model = nn.ModuleDict({"left": build("ViTModel")[0], "right": build("Dinov2Model")[0]})
    with pytest.raises(UnsupportedModel, match=r"2 vision towers \(left, right\).*testreg.find\(model.left, images\)"):
        find_tower(model)
    assert find_tower(model["right"]).family == "dinov2"


def test_what_is_no_model_is_refused():
    with pytest.raises(UnsupportedModel, match=r"a torch\.nn\.Module, but str was given"):
        find_tower("google/vit-base-patch16-224")


def test_a_tower_built_in_another_way_than_its_family_is_refused():
    model, _ = build("ViTModel")
    del model.layers[1].mlp.fc2
    with pytest.raises(UnsupportedModel, match=re.escape("its block 1 (ViTLayer) has no mlp.fc2")):
        find_tower(model)


def test_a_row_may_name_one_path_or_several():
    assert Family("A", "layers", "mlp.fc2").towers == "A"
    model, _ = build("ViTModel")
    assert reach(model, ("nothing.here", "layers")) is model.layers
    assert reach(model, "nothing.here") is None


# What the documentation says


@pytest.mark.parametrize("page", ["README.md", "docs/families.md"])
def test_the_support_table_is_the_registrys(page):
    text = (Path(__file__).parents[2] / page).read_text()
    if page == "docs/families.md":
        assert support.BEGIN in text
    if support.BEGIN in text:
        shown = text[text.index(support.BEGIN) : text.index(support.END) + len(support.END)]
        assert shown == support.table(), "run `python -m docs.support`"


def test_the_worked_example_of_the_documentation_works(monkeypatch):
    """Every Python block of docs/families.md, run one after the other."""
    monkeypatch.setattr(testreg.runtime.families, "FAMILIES", dict(FAMILIES))
    monkeypatch.setattr(testreg, "FAMILIES", testreg.runtime.families.FAMILIES)
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 3
    names: dict = {"__name__": "garden"}
    for block in blocks:
        exec(compile(block, "docs/families.md", "exec"), names)
    assert find_tower(names["model"]).family == "garden-vit"
