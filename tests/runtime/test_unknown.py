"""What no row describes: the row that the error shows is right, tried, and not shown where it would do nothing."""

from __future__ import annotations

import packed
import pytest
import torch
import zoo
from originals import CHANNELS, CustomResidualAttentionBlock, Embedded, Transformer, of
from torch import Tensor, nn

import testreg
from testreg import FAMILIES, Family, UnsupportedModel, patch
from testreg.runtime.guess import guess, tried, written
from testreg.runtime.towers import find_tower, resolve

BUILDERS = {**dict.fromkeys(zoo.ROWS, zoo.build), **dict.fromkeys(packed.ROWS, packed.build)}


def built(name: str) -> nn.Module:
    model = BUILDERS[name](name)
    return model[0] if isinstance(model, tuple) else model


@pytest.mark.parametrize("name", list(BUILDERS))
def test_the_guess_for_a_model_is_what_its_row_says(name):
    """Every tower that is known, looked at as if it were not."""
    model = built(name)
    wanted = find_tower(model)
    found = guess(model)
    assert found is not None
    module, row = found
    tower = resolve("", module, "my-vit", row)
    assert tower.blocks == wanted.blocks
    assert tower.downs == wanted.downs
    assert tower.attentions == wanted.attentions
    assert tower.prefix == wanted.prefix
    assert tried(tower)[0].sequence_first == wanted.sequence_first
    assert row.segments == wanted.row.segments


def told(model: nn.Module) -> str:
    with pytest.raises(UnsupportedModel) as refused:
        find_tower(model)
    return str(refused.value)


@of("garden")
class Rose(Embedded):
    """A class embedding, a norm before the blocks, native registers, masks, a gate after the MLP's second linear."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

        def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            return self.out(nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), attn_mask))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attn, self.norm2 = nn.LayerNorm(CHANNELS), Rose.Attention(), nn.LayerNorm(CHANNELS)
            self.up, self.down, self.gate = nn.Linear(CHANNELS, 64), nn.Linear(64, CHANNELS), nn.Linear(CHANNELS, 64)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(self.norm(x))
            y = self.norm2(x)
            return x + self.down(self.up(y) * self.gate(y).sigmoid())

    def __init__(self) -> None:
        super().__init__(class_token=False)
        self.class_embedding = nn.Parameter(torch.zeros(CHANNELS))
        self.num_register_tokens = 2
        self.register_tokens = nn.Parameter(torch.zeros(1, 2, CHANNELS))
        self.ln_pre = nn.LayerNorm(CHANNELS)
        self.trunk = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedded(x)
        first = self.class_embedding.expand(len(x), 1, -1), self.register_tokens.expand(len(x), -1, -1)
        x = self.ln_pre(torch.cat([*first, x], 1))
        for layer in self.trunk:
            x = layer(x)
        return x


def test_the_row_that_is_shown_has_all_that_can_be_seen():
    row = (
        '"Rose", "trunk", "down", "attn", prefix=1, prefix_from="num_register_tokens", seed="ln_pre", '
        'masks=("attn_mask",), package="garden"'
    )
    assert told(Rose()).endswith(
        f"(tried on its first block); on the command line by --family '{row}', in Python by\n"
        f'    testreg.FAMILIES["my-vit"] = testreg.Family(\n        {row})'
    )


@of("garden")
class Sequential(nn.Module):
    """Blocks that take (tokens, batch, channels), with an attention that does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, CHANNELS, 8, 8)
        self.transformer = Transformer(CustomResidualAttentionBlock)

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer(self.conv1(x).flatten(2).permute(2, 0, 1)).transpose(0, 1)


def test_blocks_that_take_tokens_before_images_are_told_by_trial():
    message = told(Sequential())
    assert "which takes (tokens, batch, channels)" in message
    assert "sequence_first=True" in message


@of("garden")
class Listed(nn.Module):
    """Blocks are lists, whose parts are called one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, CHANNELS, 8, 8)
        self.layers = nn.ModuleList(
            nn.ModuleList([Rose.Attention(), nn.Sequential(nn.Linear(CHANNELS, 64), nn.Linear(64, CHANNELS))])
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for attention, mlp in self.layers:
            x = attention(x) + x
            x = mlp(x) + x
        return x


def test_blocks_that_are_never_called_get_no_row(monkeypatch):
    model = Listed()
    assert "testreg.Family(" not in told(model)
    monkeypatch.setitem(FAMILIES, "mine", Family("Listed", "layers", "1.1", "0", prefix=0, package="garden"))
    assert "block 0 (ModuleList) is a list that is never called" in told(model)


def test_vit_pytorch_is_refused_by_name():
    vit = pytest.importorskip("vit_pytorch")
    model = vit.ViT(image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, heads=4, mlp_dim=48)
    assert told(model) == (
        "ViT cannot have registers: its blocks are lists that are never called, so nothing can join before one or "
        "leave after it."
    )


def test_a_row_whose_second_linear_is_the_gate_is_refused(monkeypatch):
    monkeypatch.setitem(FAMILIES, "mine", Family("Rose", "trunk", "gate", "attn", package="garden"))
    assert "has 64 channels where its residual stream has 32 after gate, so that is no second linear" in told(Rose())


def test_a_row_without_class_token_for_a_tower_that_has_one_is_refused(monkeypatch):
    monkeypatch.setitem(FAMILIES, "mine", Family("Rose", "trunk", "down", "attn", prefix=0, package="garden"))
    assert "it has a class_embedding, where its family has no class token" in told(Rose())


def test_a_part_that_is_never_called_gets_no_row():
    model = zoo.build("dinov2.DinoVisionTransformer")[0]
    type(model).__module__, before = "garden", type(model).__module__
    try:
        for block in model.blocks:
            block.mlp = zoo.originals.mlp("fused w1 w2 w3")
        message = told(model)
    finally:
        type(model).__module__ = before
    assert "its first block runs without calling its second linear (Linear) as a module" in message
    assert "testreg.Family(" not in message


def test_a_model_that_reads_text_and_sees_is_not_called_a_text_model():
    model = nn.Linear(2, 2)
    model.main_input_name = "input_ids"
    assert "is a text model" in told(model)
    model.input_modalities = ("image", "text")
    assert "is of no known family" in told(model)


def test_the_row_that_was_shown_works(monkeypatch):
    monkeypatch.setattr(testreg.runtime.families, "FAMILIES", dict(FAMILIES))
    monkeypatch.setattr(testreg, "FAMILIES", testreg.runtime.families.FAMILIES)
    torch.manual_seed(0)
    for make in (Rose, Sequential):
        model, images = make().eval(), torch.randn(4, 3, 32, 32)
        zoo.scale(model)
        message = told(model)
        exec(message[message.index("testreg.FAMILIES") :], {"testreg": testreg})
        with torch.no_grad():
            with patch(model, testreg.RegisterPlan({1: (3, 9)}, registers=0)):
                none = model(images)
            with patch(model, testreg.RegisterPlan({1: (3, 9)}, registers=2)):
                together, alone = model(images), torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        assert (together - none).abs().max() > 1e-3  # registers are tokens, not images
        del testreg.FAMILIES["my-vit"]


def test_a_row_is_written_as_its_user_would():
    row = Family("A", ("b", "c"), prefix=0, padded=True, package=("d",))
    assert written(row) == '"A", ("b", "c"), "mlp.fc2", ("attention.attention", "attention"), ' + (
        'prefix=0, padded=True, package=("d",)'
    )
