"""`check`: everything that a row can get wrong, tried on a tiny model of its family."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.installer import patch
from ..runtime.plan import RegisterPlan
from ..runtime.towers import Tower, find_tower
from .hiding import check_hidden_registers
from .outputs import Inputs, close, outputs, unit_gain
from .planting import check_planted

IMAGES = 3


def check(model: nn.Module, inputs: Inputs, *, seed: int = 0) -> Tower:
    """Check a family's row on a small model of it: the tower, undoing, each image for itself, masks and positions, and
    that planted register neurons are found and moved.

    Args:
        model: of any weights, which a copy with random ones stands in for; small, since it runs some twenty times; with
            two blocks or more.
        inputs: how many images -> what the model is called with; other random images at every call will do.
        seed: of the weights and inputs.

    Returns:
        The tower, as the row finds it.

    Raises:
        UnsupportedModel: no row describes the model.
        AssertionError: the row is wrong; the message says what was tried, and where it shows.
    """
    model = copy.deepcopy(model).eval()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        unit_gain(model)
        few = inputs(IMAGES)
        tower = check_tower(model, few)
        check_undone(model, few)
        check_each_image_alone(model, few)
        for kind in ("eager", "sdpa"):
            check_hidden_registers(model, few, kind)
            check_hidden_registers(model, few, kind, plans(tower)[-1])
        _in_one_of_several_soils(model, inputs)
    return tower


def _in_one_of_several_soils(model: nn.Module, inputs: Inputs) -> None:
    """`check_planted` on up to five draws of weights: without biases, a planted neuron may fire elsewhere in one."""
    for left in reversed(range(5)):
        try:
            return check_planted(model, inputs)
        except AssertionError:
            if not left:
                raise
            unit_gain(model)


def check_tower(model: nn.Module, inputs: Mapping[str, Any]) -> Tower:
    """Blocks take and give tokens, and second linears read the neurons of the same tokens, as the row says.

    Raises:
        AssertionError: they do not.
    """
    tower = find_tower(model)
    shapes: dict[str, tuple[int, ...]] = {}

    def note(at: str, value: Any) -> None:
        shapes[at] = tuple(tower.batched(value).shape)

    handles = []
    for index, (block, down, attention) in enumerate(zip(tower.blocks, tower.downs, tower.attentions, strict=True)):
        handles += [
            down.register_forward_pre_hook(lambda _, args, at=f"neurons {index}": note(at, args[0])),
            block.register_forward_hook(lambda _, args, out, at=f"tokens {index}": note(at, out)),
            attention.register_forward_hook(lambda _, args, out, at=f"attention {index}": note(at, out)),
        ]
    outputs(model, inputs)
    for handle in handles:
        handle.remove()
    for index in range(len(tower.blocks)):
        if f"tokens {index}" not in shapes or len(shapes[f"tokens {index}"]) != 3:
            raise AssertionError(f"block {index} gives {shapes.get(f'tokens {index}')}, not (batch, tokens, channels).")
        batch, tokens, channels = shapes[f"tokens {index}"]
        expected = {
            f"tokens {index}": (batch, tokens, tower.channels),
            f"neurons {index}": (batch, tokens, tower.neurons[index]),
            f"attention {index}": (batch, tokens, channels),
        }
        for name, shape in expected.items():
            if tuple(shapes.get(name, ())) != shape:
                raise AssertionError(
                    f"{name} have the shape {tuple(shapes.get(name, ()))}, where {shape} was expected."
                )
        if not 0 <= tower.prefix < tokens:
            raise AssertionError(f"{tower.prefix} tokens stand in front of the patches, of {tokens} in all.")
    return tower


def check_undone(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Registers change what a model gives, not its shapes nor weights; without them all is as before, bit for bit.

    Raises:
        AssertionError: something is left over, or nothing changes.
    """
    before, weights = outputs(model, inputs), {key: value.clone() for key, value in model.state_dict().items()}
    for plan in plans(find_tower(model)):
        with patch(model, plan):
            during, copied = outputs(model, inputs), copy.deepcopy(model)
            if {key: value.shape for key, value in during.items()} != {
                key: value.shape for key, value in before.items()
            }:
                raise AssertionError(f"with {plan} the outputs have other shapes than without.")
            if all(torch.equal(during[path], tensor) for path, tensor in before.items()):
                raise AssertionError(f"with {plan} the model gives what it gives without: nothing acts.")
            close(model.state_dict(), weights, f"weights with {plan}", exact=True)
        close(outputs(model, inputs), before, f"after {plan} was removed", exact=True)
        close(outputs(copied, inputs), during, f"a copy of the model with {plan}")


def check_each_image_alone(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """With registers, an image in a batch is what it is alone.

    Raises:
        AssertionError: images of a batch know of each other.
    """
    batch = max(len(value) for value in inputs.values() if isinstance(value, Tensor))
    for plan in plans(find_tower(model)):
        with patch(model, plan):
            together = outputs(model, inputs)
            for index in range(batch):
                alone = outputs(model, {name: _one(value, index, batch) for name, value in inputs.items()})
                mine = {path: tensor[index : index + 1] for path, tensor in together.items() if _has(tensor, batch)}
                close({path: alone[path] for path in mine}, mine, f"image {index} alone and in a batch, with {plan}")


def plans(tower: Tower) -> list[RegisterPlan]:
    """Every form of registers, with neurons in the first and the last block; the last is seen by attention alone."""
    last = len(tower.blocks) - 1
    neurons = {0: (1, 5), last: (0, 3)} if last else {0: (1, 5)}
    state = torch.linspace(-1, 1, tower.channels)
    return [
        RegisterPlan(neurons, registers=2),
        RegisterPlan(neurons, registers=2, entry=min(1, last), state=state),
        RegisterPlan({}, registers=2, state=state.expand(len(tower.blocks), 2, -1)),
    ]


def _one(value: Any, index: int, batch: int) -> Any:
    return value[index : index + 1] if isinstance(value, Tensor) and _has(value, batch) else value


def _has(tensor: Tensor, batch: int) -> bool:
    return tensor.ndim > 0 and len(tensor) == batch
