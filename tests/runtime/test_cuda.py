"""One model of every family on a GPU: as on the processor in float32, and as near as half precision allows in it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import FIRST, ROWS, build, pixels

import testreg
from testreg import RegisterPlan
from testreg.runtime.towers import find_tower
from testreg.testing import tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

DEVICE = "cuda"
NEURONS = {0: (1, 5), 1: (3,), 2: (0, 7)}


def plans(model: nn.Module) -> list[RegisterPlan]:
    tower = find_tower(model)
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(len(tower.blocks) - 1, 3, tower.channels, generator=generator)
    found = [RegisterPlan(NEURONS, 3, 1, rows)]
    if not tower.row.packed:
        found += [RegisterPlan(NEURONS, 3, 1, rows[0]), RegisterPlan(NEURONS, 2)]
    return found


def run(model: nn.Module, inputs: dict[str, Any], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    inputs[pixels(inputs)] = inputs[pixels(inputs)].to(dtype)  # not the noise that MAE orders its patches by
    with torch.no_grad():
        output = model.to(device, dtype)(**inputs)
    return {path: tensor.float().cpu() for path, tensor in tensors(output).items() if tensor.is_floating_point()}


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest, relative to what is wanted."""
    assert found.keys() == wanted.keys()
    return max(float((found[path] - wanted[path]).norm() / wanted[path].norm().clamp(min=1e-3)) for path in wanted)


@pytest.mark.parametrize("name", FIRST)
def test_a_gpu_computes_what_the_processor_does(name: str) -> None:
    try:
        model, inputs = build(name)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"its library is not here: {error}")
    plain = run(model, inputs, "cpu", torch.float32)
    halves = () if ROWS[name].single else (torch.bfloat16, torch.float16)
    for plan in plans(model):
        with testreg.patch(model, plan):
            expected = run(model, inputs, "cpu", torch.float32)
            assert distance(expected, plain) > 0.01, plan
            for dtype, near in ((torch.float32, 0.01), *((half, 0.1) for half in halves)):
                found = run(copy.deepcopy(model), inputs, DEVICE, dtype)
                assert distance(found, expected) < near, (plan, dtype)
