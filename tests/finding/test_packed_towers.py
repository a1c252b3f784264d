"""Packed towers from images to a plan: one image a pass, sizes that differ, and what was planted is found and gone."""

from __future__ import annotations

from typing import Any

import packed
import pytest
import torch
from torch import Tensor, nn

from testreg import find, inspect, patch
from testreg.finding.observe import run
from testreg.runtime.towers import Tower, find_tower

EVERY = pytest.mark.parametrize("name", list(packed.ROWS))
BLOCK, NEURON, STRENGTH, MARK = 1, 7, 40.0, 2.0
SIZES: tuple[packed.Grid, ...] = ((1, 4, 8), (1, 8, 4), (1, 4, 4), (1, 8, 8), (1, 4, 12), (1, 8, 4)) * 2


def photos(name: str) -> tuple[list[dict[str, Tensor]], list[int]]:
    """Images as the model's processor would give them, one patch of each loud, and which."""
    found, places = [], []
    first = next(iter(packed.inputs(name, SIZES[:1])))
    for index, grid in enumerate(SIZES):
        given = packed.inputs(name, [grid])
        pixels = given.pop(first).clone()
        pixels += 0.1 * torch.randn(
            pixels.shape, generator=torch.Generator().manual_seed(index)
        )  # no photo comes twice
        place = index % 4
        if pixels.shape[:2] == (1, 3):
            pixels[..., : packed.PATCH, packed.PATCH * place : packed.PATCH * (place + 1)] = MARK
        elif packed.ROWS[name].cells > 1:
            pixels[0, : packed.PATCH, : packed.PATCH] = MARK
            place = 0
        else:
            (pixels[0] if pixels.shape[0] == 1 else pixels)[place] = MARK
        named = {key if key.startswith("image_") else f"image_{key}": value for key, value in given.items()}
        found.append({"pixel_values": pixels[0] if packed.ROWS[name].patch[:1] == (1,) else pixels, **named})
        places.append(place)
    return found, places


@torch.no_grad()
def plant(model: nn.Module, images: list[dict[str, Tensor]], places: list[int]) -> None:
    """Let one neuron fire at the loud patches, told apart by least squares, and write an outlier there."""
    tower = find_tower(model)
    readers = _readers(tower)
    read: list[Tensor] = []
    marks: list[Tensor] = []
    for image, place in zip(images, places, strict=True):
        seen: list[Tensor] = []
        handle = readers[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        _run(model, image)
        handle.remove()
        tokens = tower.batched(seen[0])[0]
        read.append(tokens)
        marks.append(nn.functional.one_hot(torch.tensor(_token(model, image, place)), len(tokens)))
    flat, wanted = torch.cat(read).double(), torch.cat(marks).double()
    flat = torch.cat([flat, torch.ones(len(flat), 1, dtype=flat.dtype)], 1)
    weights = 1 + wanted * (len(wanted) / wanted.sum() - 1)
    fit = torch.linalg.lstsq(flat * weights[:, None].sqrt(), (wanted * weights.sqrt())[:, None]).solution[:, 0]
    for reader in readers:
        for row in range(NEURON, reader.out_features, tower.neurons[BLOCK]):
            reader.weight[row] = 8 * fit[:-1].float()
            if reader.bias is not None:
                reader.bias[row] = 8 * (fit[-1] - 0.5).float()
    column = torch.randn(tower.channels, generator=torch.Generator().manual_seed(7))
    tower.downs[BLOCK].weight[:, NEURON] = STRENGTH * (column - column.mean())


def _readers(tower: Tower) -> list[nn.Linear]:
    inside = set(map(id, tower.attentions[BLOCK].modules()))
    return [
        module
        for module in tower.blocks[BLOCK].modules()
        if isinstance(module, nn.Linear) and id(module) not in inside and module is not tower.downs[BLOCK]
    ]


def _run(model: nn.Module, image: dict[str, Tensor]) -> Any:
    from testreg.images.sources import apart

    return run(model, apart(dict(image))[0])


def _token(model: nn.Module, image: dict[str, Tensor], place: int) -> int:
    """Where the loud patch is among the block's tokens: what enters the first block there is like nothing else."""
    tower = find_tower(model)

    def first(given: dict[str, Tensor]) -> Tensor:
        kept: list[Tensor] = []
        handle = tower.blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: kept.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        _run(model, given)
        handle.remove()
        return tower.batched(kept[0])[0]

    louder = dict(image)
    louder["pixel_values"] = torch.where(image["pixel_values"] == MARK, MARK + 1, image["pixel_values"])
    return int((first(louder) - first(image)).norm(dim=-1).argmax())


def norms(model: nn.Module, image: dict[str, Tensor]) -> Tensor:
    tower, found = find_tower(model), []
    handles = [
        block.register_forward_hook(lambda _, args, output: found.append(tower.batched(output)[0, tower.prefix :]))
        for block in tower.blocks
    ]
    _run(model, image)
    for handle in handles:
        handle.remove()
    return torch.stack(found).norm(dim=-1)  # (blocks, patches)


@EVERY
def test_a_planted_neuron_is_found_and_gone(name):
    model = packed.build(name)
    images, places = photos(name)
    plant(model, images, places)
    spoilt = [norms(model, image) for image in images]
    threshold = 5 * torch.cat([row[BLOCK] for row in spoilt]).median()
    assert all((row[BLOCK] > threshold).any() for row in spoilt)

    looked = inspect(model, images)
    assert looked.artefact is not None
    assert looked.images == len(images)
    plan = find(model, images, force=True)  # nothing but the planted neuron is trained
    assert plan.form == "attention"
    assert (BLOCK, NEURON) in plan.pairs
    assert plan.provenance["candidates"][0]["neuron"] == NEURON
    with patch(model, plan):
        for image in images:
            assert (norms(model, image) < threshold).all()
        assert inspect(model, images).artefact is None
    assert plan.provenance["after"]["outlier_patches"] == 0
    assert plan.provenance["guard"]["features"] > 0.8  # ordinary patches stay, as in the plain ViTs of the zoo
