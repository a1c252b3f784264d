"""Where the attention of a vision tower goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..metrics.sinks import EPSILON
from ..runtime.paths import reach
from ..runtime.towers import Tower, find_tower
from .closer import Glance
from .detect import Artefact

NATIVE = (
    "config.num_register_tokens",
    "config.num_registers",
    "num_reg_tokens",
    "num_register_tokens",
    "n_storage_tokens",
    "patch_generator.num_registers",
)


@dataclass(frozen=True)
class Attending:
    """Where attention goes: shares of 1 that get there from the mean query, mean over blocks, heads and a few images.

    Attributes:
        patch: to the one patch that gets most.
        prefix: to class and distillation token.
        native: to registers that the model was trained with.
        registers: to test-time registers.
        rate: sink rate of the patch that is a sink in most blocks and heads (arXiv 2410.10781, section 3.1).
        outliers: to all outlier patches together, in the blocks behind the one at whose output they appear; 0 without.
    """

    patch: float
    prefix: float
    native: float
    registers: float
    rate: float
    outliers: float = 0.0


def attending(glances: Iterable[Glance], tower: Tower, found: Artefact | None) -> Attending | None:
    """Where attention goes; None where no image shows it."""
    rows = [_shares(glance, tower, found) for glance in glances if glance.attention is not None]
    return Attending(*torch.tensor(rows).mean(0).tolist()) if rows else None


def _shares(glance: Glance, tower: Tower, found: Artefact | None) -> list[float]:
    assert glance.attention is not None
    alpha, own = glance.attention, native(tower)  # (blocks, heads, tokens)
    patches = alpha[..., tower.prefix :]
    behind = patches[found.block + 1 :, :, glance.outliers] if found else patches[:0]
    shares = (
        patches.amax(-1).mean(),
        alpha[..., : tower.prefix - own].sum(-1).mean(),
        alpha[..., tower.prefix - own : tower.prefix].sum(-1).mean(),
        (1 - alpha.sum(-1)).clamp(min=0).mean(),
        (patches > EPSILON).float().mean((0, 1)).amax(),
        behind.sum(-1).mean() if len(behind) else 0.0,
    )
    return [float(share) for share in shares]


def native(model: nn.Module | Tower) -> int:
    """How many registers a model was trained with."""
    tower = model if isinstance(model, Tower) else find_tower(model)
    return int(reach(tower.module, NATIVE) or 0)
