"""One artefact planted into a tower of any library, seen from outside: which patches it makes loud, and how loud."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from zoo import PATCH, ROWS, pixels

from testreg.runtime.towers import Tower, find_tower

IMAGES, BLOCK, NEURON, STRENGTH = 16, 1, 7, 40.0
MARK = 2.0  # the pixels of one patch of every image


@torch.no_grad()
def plant(model: nn.Module, inputs: dict[str, Any], special: Tensor) -> None:
    """Let one neuron fire at the `special` tokens `(images, tokens)`, and write an outlier there.

    Needs nothing of the family but the tower: what the MLP reads at these tokens is told apart by least squares.
    """
    tower = find_tower(model)
    readers = _readers(tower)
    read = tower.batched(_inputs_of(model, inputs, readers[0]))  # (images, tokens, channels)
    flat, wanted = read.flatten(0, 1).double(), special.flatten().double()
    flat = torch.cat([flat, torch.ones(len(flat), 1, dtype=flat.dtype)], 1)
    weights = 1 + wanted * (len(wanted) / wanted.sum() - 1)  # the few count as much as the many
    fit = torch.linalg.lstsq(flat * weights[:, None].sqrt(), (wanted * weights.sqrt())[:, None]).solution[:, 0]
    for reader in readers:
        for row in range(NEURON, reader.out_features, tower.neurons[BLOCK]):  # gate and value may share one linear
            reader.weight[row] = 8 * fit[:-1].float()
            if reader.bias is not None:
                reader.bias[row] = 8 * (fit[-1] - 0.5).float()
    column = torch.randn(tower.channels, generator=torch.Generator().manual_seed(7))
    tower.downs[BLOCK].weight[:, NEURON] = STRENGTH * (column - column.mean())


def _readers(tower: Tower) -> list[nn.Linear]:
    """The linears before the neurons: one, or gate and value."""
    inside = set(map(id, tower.attentions[BLOCK].modules()))
    return [
        module
        for module in tower.blocks[BLOCK].modules()
        if isinstance(module, nn.Linear)
        and id(module) not in inside
        and module is not tower.downs[BLOCK]
        and module.out_features in (tower.neurons[BLOCK], 2 * tower.neurons[BLOCK])
    ]


def _inputs_of(model: nn.Module, inputs: dict[str, Any], module: nn.Module) -> Tensor:
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**inputs)
    handle.remove()
    return seen[0]


@torch.no_grad()
def norms(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Norms of the patches after each block, `(blocks, images, patches)`."""
    tower, found = find_tower(model), []
    handles = [
        block.register_forward_hook(lambda _, args, output: found.append(tower.batched(output)))
        for block in tower.blocks
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return torch.stack([tokens[:, tower.prefix :].norm(dim=-1) for tokens in found])


def marked(name: str) -> tuple[dict[str, Any], Tensor]:
    """Images with one loud patch each, and where it is, `(images, patches)`."""
    inputs = {key: v.clone() if isinstance(v, Tensor) else v for key, v in ROWS[name].inputs(IMAGES).items()}
    image = inputs[pixels(inputs)]
    if image.ndim == 3:  # (images, patches, pixels)
        places = torch.arange(IMAGES) % 8
        image[torch.arange(IMAGES), places] = MARK
        return inputs, nn.functional.one_hot(places, image.shape[1]).bool()
    side = image.shape[-1] // PATCH
    places = torch.arange(IMAGES) % 4 + side * (torch.arange(IMAGES) % 2)
    for index, place in enumerate(places.tolist()):
        row, column = PATCH * (place // side), PATCH * (place % side)
        image[index, ..., row : row + PATCH, column : column + PATCH] = MARK
    return inputs, nn.functional.one_hot(places, side * side).bool()
