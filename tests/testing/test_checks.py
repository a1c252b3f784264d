"""The public checks of a row: a right one passes in ten lines, and each way to be wrong is seen by its name."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from garden.garden.model import GardenViT
from garden.garden.rows import GARDEN_VIT
from torch import nn
from zoo import FIRST, ROWS, build

import testreg
from testreg.testing import check, check_hidden_registers, check_undone

HERE = GardenViT.__module__.split(".")[0]


@pytest.fixture
def row(monkeypatch):
    """Sets the row of `GardenViT`, with changes."""
    monkeypatch.setattr(testreg.runtime.families, "FAMILIES", {})

    def put(**changes):
        testreg.runtime.families.FAMILIES["garden"] = replace(GARDEN_VIT, package=HERE, **changes)

    return put


def images(count):
    return {"images": torch.randn(count, 3, 32, 32)}


def test_a_right_row_passes(row):
    row()
    tower = check(GardenViT(), images)
    assert (tower.family, tower.prefix, len(tower.blocks)) == ("garden", 1, 3)


def test_the_model_that_is_checked_stays_as_it_was(row):
    row()
    model = GardenViT().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    check(model, images)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert testreg.active(model) is None


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"down": "grow"}, "128 channels where its residual stream has 32"),
        ({"prefix": 0}, "has a class_token, where its family has no class token"),
        ({"prefix": 17}, r"17 tokens stand in front of the patches, of 17"),
        ({"attention": "norm1"}, "2 attention registers .* nothing acts"),
        ({"attention": "attn.out"}, "2 attention registers .* nothing acts"),
        ({"masks": ("x",)}, r"."),
    ],
)
def test_a_wrong_row_does_not(row, wrong, says):
    row(**wrong)
    if wrong == {"masks": ("x",)}:
        check(GardenViT(), images)  # an argument that is no mask of two lengths is left alone
        return
    with pytest.raises((AssertionError, testreg.UnsupportedModel), match=says):
        check(GardenViT(), images)


class Pooled(GardenViT):
    """A block that knows how many tokens there are."""

    def __init__(self):
        super().__init__()
        self.trunk[1].forward = self._counting

    def _counting(self, x):
        return type(self.trunk[1]).forward(self.trunk[1], x) / x.shape[1]


def test_a_block_that_counts_its_tokens_is_seen(row):
    row()
    with pytest.raises(AssertionError, match="registers that nobody attends to, eager: the output 0 differs"):
        check_hidden_registers(Pooled().eval(), images(2))


class Mixing(GardenViT):
    """A block in which images of a batch know of each other."""

    def forward(self, images):
        pooled, patches = super().forward(images)
        return pooled + patches.mean((0, 1)), patches


def test_images_that_know_of_each_other_are_seen(row):
    row()
    with pytest.raises(AssertionError, match="image 0 alone and in a batch"):
        check(Mixing(), images)


def test_a_patch_that_does_nothing_is_seen(row, monkeypatch):
    row()
    monkeypatch.setattr(testreg.runtime.forwards.redirect, "move", lambda activation, *_, **__: activation)
    monkeypatch.setattr(testreg.runtime.forwards.redirect, "join", lambda registers, tokens: tokens)
    model = GardenViT().eval()
    with pytest.raises(AssertionError, match=r"nothing acts|other shapes"):
        check_undone(model, images(2))


def test_other_attention_than_torchs_is_told(row, monkeypatch):
    row()
    model = GardenViT().eval()

    def uniform(self, x):
        return self.out(x.mean(1, keepdim=True).expand_as(x))

    monkeypatch.setattr(type(model.trunk[0].attn), "forward", uniform)
    with pytest.raises(AssertionError, match="was seen 0 times in 3 blocks"):
        check_hidden_registers(model, images(2))


@pytest.mark.parametrize("name", FIRST)
def test_every_family_of_this_project_passes_them_all(name):
    model, _ = build(name)
    if name == "ViTMAEModel":
        model.config.mask_ratio = 0.0
    check(model, ROWS[name].inputs)


def test_they_need_no_test_runner():
    code = "import sys, testreg.testing\nassert not {'pytest', '_pytest'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unit_gain_leaves_scalars_alone():
    model = nn.Module()
    model.temperature = nn.Parameter(torch.tensor(2.0))
    testreg.testing.unit_gain(model)
    assert model.temperature.item() == 2
