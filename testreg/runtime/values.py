"""A plan's numbers as they come from a user or a file: checked, since a file is a stranger's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import BadPlan

LARGEST = torch.finfo(torch.float32).max


def by_block(values: Any, name: str) -> dict[int, Any]:
    """JSON's text keys as block indices."""
    if not isinstance(values, dict) or not all(str(key).isdecimal() and len(key) < 10 for key in values):
        raise BadPlan(f"the plan's {name} must be a JSON object with blocks as keys, not {values!r:.100}.")
    if not all(isinstance(row, list) for row in values.values()):
        raise BadPlan(f"the plan's {name} must hold one list per block, not {values!r:.100}.")
    return {int(block): row for block, row in values.items()}


def resting(rest: Any, neurons: Mapping[int, tuple[int, ...]]) -> dict[int, tuple[float, ...]]:
    rows = rest if isinstance(rest, Mapping) and all(isinstance(row, (list, tuple)) for row in rest.values()) else {}
    if {block: len(row) for block, row in rows.items()} != {block: len(row) for block, row in neurons.items()}:
        raise BadPlan(f"rest must hold one number per register neuron, {dict(neurons)}, not {rest!r:.200}.")
    for value in (value for row in rows.values() for value in row):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
            raise BadPlan(f"rest holds {value!r:.50}, which is no finite number.")
    return {block: tuple(map(float, rows[block])) for block in neurons}


def index(value: Any, name: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or not 0 <= value.__index__() < 2**63:
        huge = isinstance(value, int) and value.bit_length() > 64
        raise BadPlan(f"{name} must be a whole number from 0, not {'one of many digits' if huge else repr(value)}.")
    return value.__index__()


def indices(row: Any, block: Any) -> tuple[int, ...]:
    if isinstance(row, (str, bytes)) or not hasattr(row, "__iter__"):
        raise BadPlan(f"the neurons of block {block} must be a sequence of whole numbers, not {row!r}.")
    found = sorted(index(value, f"a neuron of block {block}") for value in row)
    if len(set(found)) != len(found):
        raise BadPlan(f"block {block} names a neuron twice: {found}.")
    return tuple(found)


def held(state: Any, registers: int) -> Tensor:
    """The state of constant registers `(registers, channels)`, or of attention's `(blocks, registers, channels)`."""
    state = torch.as_tensor(state).detach().to("cpu", torch.float32)
    if state.ndim == 1:
        state = state.expand(registers, -1)
    if state.ndim not in (2, 3) or state.shape[-2] != registers:
        raise BadPlan(
            f"state has the shape {tuple(state.shape)}; {registers} registers need (channels,) or ({registers}, "
            f"channels) to join as tokens, or (blocks from entry on, {registers}, channels) in attention alone."
        )
    if not state.isfinite().all():
        raise BadPlan("state holds NaN or infinity; the images or the weights that it was measured on are broken.")
    return state.clone()
