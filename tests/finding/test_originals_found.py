"""Makers' own code from photos to a plan: processed by what the user says, since nothing lies with the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from PIL import Image
from torch import Tensor, nn

import testreg
from testreg import BadImages, RegisterPlan, find, patch
from testreg.finding.observe import observe, run
from testreg.images.streaming import stream
from testreg.runtime.towers import find_tower

BLOCK, NEURON, STRENGTH = 1, 7, 40.0
NAMES = [
    "dinov2.DinoVisionTransformer-registers", "dinov3.DinoVisionTransformer-storage", "clip.VisionTransformer",
    "pe.VisionTransformer", "EVAVisionTransformer", "InternVisionModel", "AIMv2VisionEncoder",
    "ijepa.VisionTransformer",
]  # fmt: skip
SAID = f"{zoo.SIZE}:0.5:0.25"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark noise with one white patch, of twelve in turn."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for index in range(12):
        pixels = generator.integers(0, 60, (zoo.SIZE, zoo.SIZE, 3), dtype=np.uint8)
        row, column = (zoo.PATCH * place for place in divmod(index, 4))
        pixels[row : row + zoo.PATCH, column : column + zoo.PATCH] = 255
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return folder


@torch.no_grad()
def planted(name: str, photos: Path) -> nn.Module:
    """A model one of whose neurons fires at white patches, and writes an outlier there."""
    model, _ = zoo.build(name)
    tower = find_tower(model)
    (batch,) = stream(photos, SAID, batch_size=12)
    inside = set(map(id, tower.attentions[BLOCK].modules()))
    readers = [
        part
        for part in tower.blocks[BLOCK].modules()
        if isinstance(part, nn.Linear) and id(part) not in inside and part is not tower.downs[BLOCK]
    ]
    seen: list[Tensor] = []
    handle = readers[0].register_forward_pre_hook(lambda module, args: seen.append(tower.batched(args[0])))
    run(model, batch.inputs)
    handle.remove()
    special = nn.functional.one_hot(torch.arange(12), 16)
    wanted = torch.cat([torch.zeros(12, tower.prefix), special], 1).flatten().double()
    flat = seen[0].flatten(0, 1).double()
    flat = torch.cat([flat, torch.ones(len(flat), 1, dtype=flat.dtype)], 1)
    weights = 1 + wanted * (len(wanted) / wanted.sum() - 1)
    fit = torch.linalg.lstsq(flat * weights[:, None].sqrt(), (wanted * weights.sqrt())[:, None]).solution[:, 0]
    for reader in readers:
        reader.weight[NEURON] = 8 * fit[:-1].float()
        reader.bias[NEURON] = 8 * (fit[-1] - 0.5).float()
    column = torch.randn(tower.channels, generator=torch.Generator().manual_seed(7))
    tower.downs[BLOCK].weight[:, NEURON] = STRENGTH * (column - column.mean())
    return model


@pytest.mark.parametrize("name", NAMES)
def test_from_photos_to_a_plan_that_is_saved_and_applied(name, photos, tmp_path):
    model = planted(name, photos)
    tower = find_tower(model)
    with pytest.raises(BadImages, match="processor="):
        find(model, photos)
    plan = find(model, photos, processor=SAID, force=True)
    assert (BLOCK, NEURON) in plan.pairs
    assert plan.provenance["after"]["outlier_patches"] == 0
    plan.save(tmp_path / "plan.safetensors")
    (batch,) = stream(photos, SAID, batch_size=12)

    def norms() -> Tensor:
        with observe(model, states=[2]) as seen:
            run(model, batch.inputs)
        return seen.states[2][:, tower.prefix :].norm(dim=-1)

    before = norms()
    with patch(model, RegisterPlan.load(tmp_path / "plan.safetensors")):
        after = norms()
    median = before.median()
    assert (before.amax(1) > 5 * median).all()
    assert (after < 5 * median).all()
    assert testreg.inspect(model, photos, processor=SAID).artefact is not None


def test_keys_and_maps_of_clip_are_open_clips():
    clip, open_clip = zoo._imported("clip.model"), zoo._imported("open_clip.transformer")
    ours = clip.VisionTransformer(zoo.SIZE, zoo.PATCH, zoo.CHANNELS, 3, 4, 16).eval()
    theirs = open_clip.VisionTransformer(
        zoo.SIZE, zoo.PATCH, zoo.CHANNELS, 3, 4, 4.0, output_dim=16, act_layer=open_clip.QuickGELU
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    seen = []
    for model in (ours, theirs):
        channels = find_tower(model).channels
        state = torch.randn(2, 3, channels, generator=torch.Generator().manual_seed(1))
        for plan in (None, RegisterPlan({1: (3,)}, registers=3, entry=1, state=state), RegisterPlan({1: (3,)}, 2)):
            given = {"pixel_values": zoo.images()(2)["pixel_values"]}
            with patch(model, plan or RegisterPlan({}, registers=0)):
                with observe(model, keys=[1], states=[0, 1], attentions=[1]) as what:
                    run(model, given)
                seen.append([*what.keys.values(), *what.states.values(), *what.attentions.values()])
    for keys, *states, maps in seen:
        assert [part.shape for part in (keys, *states)] == [(2, 17, zoo.CHANNELS)] * 3
        assert maps.shape == (2, 4, 17, 17)
    for mine, other in zip(seen[:3], seen[3:], strict=True):
        for found, wanted in zip(mine, other, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


MAPPED = [*NAMES, "alpha_clip.VisionTransformer", "vjepa2.VisionTransformer", "MaskedAutoencoderViT", "RadioModel"]


@pytest.mark.parametrize("name", MAPPED)
def test_maps_of_makers_own_code(name):
    """What attention gives to tokens and to registers, without and with registers of either kind."""
    model, inputs = zoo.build(name)
    tower = find_tower(model)
    state = torch.randn(2, 3, tower.channels, generator=torch.Generator().manual_seed(1))
    with observe(model, attentions=[1, 2]) as plain, torch.no_grad():
        model(**inputs)
    for plan in (RegisterPlan({1: (3,)}, registers=3, entry=1, state=state), RegisterPlan({1: (3,)}, registers=2)):
        with patch(model, plan), observe(model, attentions=[1, 2]) as seen, torch.no_grad():
            model(**inputs)
        for block in (1, 2):
            assert seen.attentions[block].shape == plain.attentions[block].shape
            torch.testing.assert_close(plain.attentions[block].sum(-1), torch.ones(plain.attentions[block].shape[:3]))
            assert (seen.attentions[block].sum(-1) < 1).all()
