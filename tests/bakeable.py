"""Models of transformers with the artefact and the plan that is right for it: one per architecture that is baked."""

import torch
import transformers as hf

from testreg import RegisterPlan
from testreg.demo.planted import plant
from testreg.finding.observe import observe, run
from testreg.runtime.towers import find_tower

SIZE, CHANNELS, BLOCKS = 64, 64, 5
VISION = {
    "hidden_size": CHANNELS, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "image_size": SIZE, "patch_size": 8,
}  # fmt: skip
WIDE = VISION | {"intermediate_size": 128}
DINO = VISION | {"mlp_ratio": 2}
MODELS = {
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**WIDE, num_labels=7)),
    "deit": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**WIDE, num_labels=7)),
    "clip": lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**WIDE, projection_dim=16)),
    "clip-classifier": lambda: hf.CLIPForImageClassification(hf.CLIPConfig(vision_config=WIDE, num_labels=7)),
    "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**WIDE)),
    "siglip-classifier": lambda: hf.SiglipForImageClassification(hf.SiglipConfig(vision_config=WIDE, num_labels=7)),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO)),
    "swiglu": lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO, use_swiglu_ffn=True)),
    "dinov2-classifier": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINO, num_labels=7)),
    "native": lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**DINO, num_register_tokens=2)),
}


def photos(count=32, size=SIZE):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def planted(name, form="constant", registers=2, seed=0):
    """A model with the artefact, and the plan that is right for it."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    found = plant(
        model, seed=seed, neurons=2, decoys=False
    )  # one of which is rewritten, the other is only switched off
    if form == "dynamic":
        return model, RegisterPlan(found.neurons, registers)
    with observe(model, states=[found.block]) as seen:
        run(model, {"pixel_values": photos(16)})
    patches = seen.states[found.block][:, find_tower(model).prefix :]
    norms = patches.norm(dim=-1)
    outliers = patches[norms > 5 * norms.median(1, keepdim=True).values]
    return model, RegisterPlan(found.neurons, registers, entry=found.block + 1, state=outliers.mean(0))


def largest(states):
    """Of patches `(images, patches, channels)`, the largest norm over its image's median."""
    norms = states.norm(dim=-1)
    return (norms / norms.median(1, keepdim=True).values).max()
