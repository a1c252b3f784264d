"""Models of timm with the artefact and the plan that is right for it: one per architecture that is baked."""

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from testreg import RegisterPlan
from testreg.finding.observe import observe, run
from testreg.runtime.towers import find_tower
from testreg.testing.planting import BLOCK, MARK, NEURON, plant

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
    plant(model, {"x": images}, special)
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
