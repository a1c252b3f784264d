"""What the neurons of a block write into the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

AT_ONCE = 1024  # neurons


def columns(down: Any, neurons: int, like: Tensor) -> Tensor:
    """The columns of a second linear, `(channels, neurons)` in float64.

    Its weight; of one that has none as it is (quantised, under an adapter), what it makes of each neuron alone.

    Args:
        like: where and in which precision it is given tokens.
    """
    weight = getattr(down, "weight", None)
    if isinstance(down, nn.Linear) and type(weight) is nn.Parameter and type(weight.data) is Tensor:
        return weight.detach().double().cpu()
    with torch.no_grad():
        nothing = down(like.new_zeros(1, 1, neurons))  # (1, 1, channels): the bias
        rows = []
        for first in range(0, neurons, AT_ONCE):
            at = torch.arange(first, min(first + AT_ONCE, neurons), device=like.device)
            one = nn.functional.one_hot(at, neurons).to(like)[None]  # (1, some neurons, neurons)
            rows.append((down(one) - nothing)[0].double().cpu())  # (some neurons, channels)
    return torch.cat(rows).T
