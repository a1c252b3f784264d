"""Where the attention of a vision tower goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..metrics.sinks import EPSILON, received
from ..runtime.errors import UnsupportedModel
from ..runtime.paths import reach
from ..runtime.towers import Tower, find_tower
from .detect import Artefact
from .observe import observe, run
from .scan import Kept

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


class _Received(dict[int, Tensor]):
    """Attention maps, of which only what every token receives is kept `(images, heads, tokens)`."""

    def __setitem__(self, block: int, maps: Tensor) -> None:
        super().__setitem__(block, received(maps).cpu())


def attending(model: nn.Module, tower: Tower, images: Iterable[Kept], found: Artefact | None) -> Attending | None:
    """Where attention goes on `images`, one pass each; None where the model's attention gives no maps."""
    rows = []
    own = native(tower)
    blocks = range(len(tower.blocks))
    behind = slice(len(blocks) if found is None else found.block + 1, None)
    try:
        with observe(model, attentions=blocks) as seen:
            for image in images:
                seen.attentions = _Received()
                run(model, image.inputs)
                alpha = torch.stack([seen.attentions[block] for block in blocks]).squeeze(1)  # (blocks, heads, tokens)
                patches = alpha[..., tower.prefix :]
                shares = (
                    patches.amax(-1).mean(),
                    alpha[..., : tower.prefix - own].sum(-1).mean(),
                    alpha[..., tower.prefix - own : tower.prefix].sum(-1).mean(),
                    (1 - alpha.sum(-1)).clamp(min=0).mean(),
                    (patches > EPSILON).float().mean((0, 1)).amax(),
                    _at(patches[behind], found, image),
                )
                rows.append(torch.stack(shares))
    except UnsupportedModel:  # its attention gives no maps
        return None
    return Attending(*torch.stack(rows).mean(0).tolist())


def _at(patches: Tensor, found: Artefact | None, image: Kept) -> Tensor:
    """What the outliers of an image receive together, mean over blocks and heads of `(blocks, heads, patches)`."""
    if found is None or not len(patches):
        return torch.zeros(())
    return patches[..., found.threshold.outliers(image.norms[found.shown])].sum(-1).mean()


def native(model: nn.Module | Tower) -> int:
    """How many registers a model was trained with."""
    tower = model if isinstance(model, Tower) else find_tower(model)
    return int(reach(tower.module, NATIVE) or 0)
