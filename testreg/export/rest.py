"""Resting neurons as weights: made constant where they are made, ahead of the second linear that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..finding.observe import run, unpatched
from ..runtime.errors import BadPlan
from ..runtime.plan import RegisterPlan
from ..runtime.towers import Tower, find_tower


def put_at_rest(model: nn.Module, plan: RegisterPlan, inputs: Mapping[str, Tensor]) -> RegisterPlan:
    """Change weights of `model`, in place, so that register neurons rest by themselves; what is left of `plan`.

    A neuron's rows in the first linear (gate and up projection of a gated MLP alike) become zero, so that it has the
    same value on every token; what it adds at rest, its column times that, goes into the second linear's bias; the
    column becomes zero. So the tensor between the two has no outlier, nor has either weight what it needed for one,
    and a quantiser that looks at what a linear is given, before the patch can, sees none either. Where the rows of a
    neuron cannot be told by the widths of the MLP's linears, or the neurons pass a norm on the way, it stays in the
    plan.

    Args:
        model: not patched; patch it with what is returned.
        plan: in the attention form; tokens of the other forms fire the neurons themselves, and need them.
        inputs: what the model is called with, of two images or more, to see that nothing else changes.

    Raises:
        BadPlan: the plan has another form.
    """
    if plan.form != "attention":
        raise BadPlan(
            f"registers of the {plan.form} form fire the neurons themselves, so these cannot rest in the weights: find "
            f"some that only attention sees, testreg.find(model, images, form='attention')."
        )
    tower = find_tower(model)
    left = {}
    for index, neurons in plan.neurons.items():
        rest = plan.rest[index] if plan.rest else (0.0,) * len(neurons)
        kept = _rest(model, tower, index, torch.tensor(neurons), torch.tensor(rest), inputs)
        if kept:
            left[index] = neurons
    rests = {index: plan.rest[index] for index in left} if plan.rest else None
    return replace(plan, neurons=left, rest=rests, provenance={})  # which names weights that are no more


@torch.no_grad()
def _rest(
    model: nn.Module, tower: Tower, index: int, neurons: Tensor, rest: Tensor, inputs: Mapping[str, Tensor]
) -> bool:
    """Whether the neurons of a block have to be left as they are."""
    down: Any = tower.downs[index]
    before = _activation(model, down, inputs)  # (batch, tokens, all neurons)
    saved = []
    for first in _first(tower, index):
        for parameter in (first.weight, first.bias):
            if parameter is not None:
                saved.append((parameter, parameter.clone()))
                parts = parameter.view(-1, down.in_features, *parameter.shape[1:])  # gate and up may lie in one
                parts[:, neurons] = 0
    after = _activation(model, down, inputs)
    value = after[..., neurons].flatten(0, -2)[0]  # (neurons,)
    others = torch.ones(down.in_features, dtype=torch.bool).index_fill(0, neurons, False)
    if not (after[..., neurons] == value).all() or not torch.equal(before[..., others], after[..., others]):
        for parameter, old in saved:
            parameter.copy_(old)
        return True
    columns = down.weight[:, neurons]  # (channels, neurons)
    if down.bias is None:
        down.bias = nn.Parameter(columns.new_zeros(len(columns)), requires_grad=False)
    down.bias.add_(columns @ rest.to(columns))
    down.weight[:, neurons] = 0
    return False


def _first(tower: Tower, index: int) -> list[nn.Linear]:
    """The linears of a block that make its neurons: all that are as wide, or twice, outside the attention."""
    down: Any = tower.downs[index]
    inside = set(tower.attentions[index].modules())
    return [
        module
        for module in tower.blocks[index].modules()
        if isinstance(module, nn.Linear)
        and module not in inside
        and module is not down
        and module.in_features == down.out_features
        and module.out_features in (down.in_features, 2 * down.in_features)
    ]


def _activation(model: nn.Module, down: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    seen: list[Tensor] = []
    hook = down.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        with unpatched(model):
            run(model, inputs)
    finally:
        hook.remove()
    return seen[0]
