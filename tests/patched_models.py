"""Tiny models with registers, what they compute, and what lies in a directory: for tests of checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from zoo import CHANNELS, build, tensors

import testreg
from testreg import RegisterPlan
from testreg.runtime.recipe import sha256

NEURONS = {0: (1, 5), 2: (47,)}


def constant(channels: int = CHANNELS, seed: int = 0, **provenance) -> RegisterPlan:
    state = 3 * torch.randn(2, channels, generator=torch.Generator().manual_seed(seed))
    return RegisterPlan(NEURONS, registers=2, entry=1, state=state, provenance=provenance)


DYNAMIC = RegisterPlan(NEURONS, registers=3)


def patched(name: str = "ViTForImageClassification", plan: RegisterPlan | None = None):
    model, inputs = build(name)
    testreg.patch(model, constant() if plan is None else plan)
    return model, inputs


@torch.no_grad()
def outputs(model, inputs) -> dict[str, torch.Tensor]:
    return tensors(model(**inputs))


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def contents(directory: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(directory.iterdir())}
