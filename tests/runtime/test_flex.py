"""Flex attention, whose masks are functions: the same outputs as the others give, registers or not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

import testreg
from testreg import RegisterPlan

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
MODELS = {
    "ViT": (ViTModel, ViTConfig),
    "DeiT": (DeiTModel, DeiTConfig),
    "DINOv2": (Dinov2Model, Dinov2Config),
    "MAE": (ViTMAEModel, ViTMAEConfig),
}
NEURONS = {0: (3,), 1: (2, 7)}
PLANS = {
    "attention": RegisterPlan(NEURONS, 2, 1, torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(1))),
    "constant": RegisterPlan(NEURONS, 2, 1, torch.randn(32, generator=torch.Generator().manual_seed(1))),
    "dynamic": RegisterPlan(NEURONS, 2),
}


@pytest.fixture(autouse=True)
def not_compiled() -> Iterator[None]:
    """The kernels compute the same without a minute of compiling."""
    with torch.compiler.set_stance("force_eager"):
        yield


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model, config = MODELS[name]
    more = {"mask_ratio": 0.0} if name == "MAE" else {}
    return model(config(**SIZES, intermediate_size=64, **more)).eval()


def last(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
    torch.manual_seed(0)  # MAE shuffles its patches
    with torch.no_grad():
        return model(*args, **kwargs).last_hidden_state


@pytest.mark.parametrize(
    ("name", "form"),
    [*(("ViT", form) for form in PLANS), ("DeiT", "constant"), ("DINOv2", "dynamic"), ("MAE", "attention")],
)
def test_flex_attention_gives_what_eager_attention_gives(name: str, form: str) -> None:
    model, images = model_of(name), torch.randn(2, 3, 32, 32)
    model.set_attn_implementation("eager")
    plain = last(model, images)
    with testreg.patch(model, PLANS[form]):
        expected = last(model, images)
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(last(model, images), expected, atol=2e-6, rtol=0)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(last(model, images), plain, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("name", "form"), [("ViT", "attention"), ("DINOv2", "constant"), ("DeiT", "dynamic")])
def test_masked_patches_change_nothing(name: str, form: str) -> None:
    """The block mask has the length without registers; what is behind it has no part in a neuron's maximum either."""
    model, images = model_of(name), torch.randn(2, 3, 32, 32)
    prefix = 2 if name == "DeiT" else 1
    mask = torch.ones(2, prefix + 16, dtype=torch.long)
    mask[0, prefix + 12 :] = 0  # the last row of patches
    mask[1, prefix + 8 :] = 0  # the last two
    other = images.clone()
    other[0, :, 24:] = 30 * torch.randn(3, 8, 32)
    other[1, :, 16:] = 30 * torch.randn(3, 16, 32)
    with testreg.patch(model, PLANS[form]):
        expected = last(model, images, attention_mask=mask)
        model.set_attn_implementation("flex_attention")
        seen = mask.bool()
        for given in (images, other):
            got = last(model, given, attention_mask=mask)
            torch.testing.assert_close(got[seen], expected[seen], atol=2e-6, rtol=0)
