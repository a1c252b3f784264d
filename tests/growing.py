"""A ViT of five blocks to plant an artefact in, and noise to look at it with."""

import torch
from transformers import ViTConfig, ViTModel

from testreg.demo.planted import plant

SHAPE = {
    "hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 96,
    "image_size": 96, "patch_size": 8,
}  # fmt: skip


def images(count=16, seed=0):
    return torch.randn(count, 3, 96, 96, generator=torch.Generator().manual_seed(seed))


def bare():
    """The model without an artefact; the same at every call."""
    torch.manual_seed(0)
    return ViTModel(ViTConfig(**SHAPE)).eval()


def grown(**settings):
    """The model, and what was planted in it."""
    model = bare()
    return model, plant(model, **settings)
