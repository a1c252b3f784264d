"""An artefact planted into a model of any family: found by its images, moved, and gone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..finding.detect import rank, valley
from ..finding.places import grid
from ..finding.scan import scan
from ..finding.search import located
from ..images.streaming import Batch
from ..runtime.installer import patch
from ..runtime.plan import RegisterPlan
from ..runtime.towers import Tower, find_tower
from .outputs import Inputs, clone, images_of

IMAGES, BLOCK, NEURON, STRENGTH = 16, 1, 7, 40.0
MARK = 2.0  # the pixels of one patch of every image


@torch.no_grad()
def plant(model: nn.Module, inputs: Mapping[str, Any], special: Tensor) -> None:
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
    down: Any = tower.downs[BLOCK]
    down.weight[:, NEURON] = STRENGTH * (column - column.mean())


def check_planted(model: nn.Module, inputs: Inputs) -> None:
    """A planted neuron is the first candidate that images give, and either form of registers takes the artefact away.

    Args:
        model: with weights of unit gain, see `unit_gain`; a copy of it is planted into.

    Raises:
        AssertionError: it is not, or they do not.
    """
    model = copy.deepcopy(model)
    tower = find_tower(model)
    given = clone(inputs(IMAGES))
    special = _marked(model, tower, given)
    clean = norms(model, given)
    plant(model, given, torch.cat([torch.zeros(IMAGES, tower.prefix, dtype=torch.bool), special], 1))
    spoilt = norms(model, given)
    threshold = 5 * spoilt[BLOCK].median()
    _expect((clean < threshold).all(), "the model has outliers before any is planted: see testreg.testing.unit_gain")
    _expect((spoilt[BLOCK:, special] > threshold).all(), "a planted neuron writes no outliers: is `down` right?")
    right = ((spoilt[BLOCK:] > threshold) == special).float().mean()
    _expect(right > 0.9, "outliers are not where they were planted: is `prefix` right?")  # it may fire elsewhere, too

    pixels = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    if "pixel_values" not in pixels:  # what the stream calls them
        pixels["pixel_values"] = pixels.pop(images_of(pixels))
    seen, sample = scan(model, tower, [Batch(pixels, tuple(map(str, range(IMAGES))))])
    ranking = rank(
        model, tower, list(sample), located(seen, valley(seen)), IMAGES, blocks=range(len(tower.blocks)), entries=()
    )
    best = (ranking.candidates[0].block, ranking.candidates[0].neuron)
    _expect(best == (BLOCK, NEURON), f"the planted neuron is {(BLOCK, NEURON)}, and the best candidate is {best}")
    for plan in (
        RegisterPlan({BLOCK: (NEURON,)}, registers=2),
        RegisterPlan({BLOCK: (NEURON,)}, registers=2, entry=BLOCK + 1, state=spoilt.new_ones(tower.channels)),
    ):
        with patch(model, plan):
            left = norms(model, given) >= threshold
        _expect(not left.any(), f"{plan.form} registers leave {int(left.sum())} outliers")


@torch.no_grad()
def norms(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Norms of the patches after each block, `(blocks, images, patches)`."""
    tower = find_tower(model)
    found: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _, args, output: found.append(tower.batched(output)))
        for block in tower.blocks
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return torch.stack([tokens[:, tower.prefix :].norm(dim=-1) for tokens in found])


def _marked(model: nn.Module, tower: Tower, inputs: dict[str, Any]) -> Tensor:
    """Make one patch of every image loud, in place, and say which tokens that is, `(images, patches)`.

    The tokens tell it themselves, by what reaches the first block: no order of theirs has to be known.
    """
    before = tower.batched(_inputs_of(model, inputs, tower.blocks[0]))[:, tower.prefix :]
    image = inputs[images_of(inputs)]
    if image.ndim == 3:  # (images, patches, pixels)
        image[torch.arange(IMAGES), torch.arange(IMAGES) % 8] = MARK
    else:
        rows, columns, size = _patches(image, before.shape[1])
        places = torch.arange(IMAGES) % min(4, columns) + columns * (torch.arange(IMAGES) % min(2, rows))
        for index, place in enumerate(places.tolist()):
            row, column = size * (place // columns), size * (place % columns)
            image[index, ..., row : row + size, column : column + size] = MARK
    changed = (tower.batched(_inputs_of(model, inputs, tower.blocks[0]))[:, tower.prefix :] - before).norm(dim=-1)
    return changed > changed.amax(1, keepdim=True) / 2  # of a video, the patch in every frame


def _patches(image: Tensor, tokens: int) -> tuple[int, int, int]:
    """Rows and columns of patches, and the pixels of one's side; of a video, in each of its steps in time."""
    height, width = image.shape[-2:]
    steps = range(1, image.shape[1] + 1) if image.ndim == 5 else (1,)
    for count in (count for count in steps if tokens % count == 0):
        rows = round((tokens / count * height / width) ** 0.5)
        if rows and rows * (tokens // count // rows) * count == tokens and height % rows == 0:
            break
    rows, columns = grid(height, width, tokens // count)
    return rows, columns, height // rows


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


@torch.no_grad()
def _inputs_of(model: nn.Module, inputs: Mapping[str, Any], module: nn.Module) -> Any:
    """What `module` is given first, while the model runs."""
    seen: list[Any] = []
    handle = module.register_forward_pre_hook(
        lambda _, args, named: seen.append([*args, *named.values()][0]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    return seen[0]


def _expect(true: Any, otherwise: str) -> None:
    if not true:
        raise AssertionError(f"{otherwise}.")
