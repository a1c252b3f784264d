"""Massive tokens of a language model: which they are, where they begin, and what attention is given for them.

Norms are summed up as those of images are, and a few sequences are kept; the score of a neuron is the same too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import TestregError
from ..runtime.towers import Tower
from ..text.streams import digest
from .detect import Artefact, largest_ratio, shares, valley
from .observe import read_text
from .ondisk import OnDisk
from .scan import Kept, Norms, Sample, outputs, relative

LEAST = 10.0  # times the median norm of its sequence: ordinary tokens of real models reach 4 to 8
KEPT = 24  # sequences that are kept: a third each for ranking, trials and guard


def scan_text(model: nn.Module, tower: Tower, batches: Iterable[Tensor], size: int = KEPT) -> tuple[Norms, Sample]:
    """Run `model` as it is over token ids `(sequences, tokens)`, once.

    Raises:
        TestregError: a block gives NaN or infinity.
    """
    norms, sample = Norms(len(tower.blocks)), Sample(size)
    for ids in batches:
        seen = token_norms(model, tower, ids)
        norms.add(seen)
        for sequence, row in zip(ids, seen, strict=True):
            sample.add(digest(sequence), partial(_keep, digest(sequence), sequence, row))
    return norms, sample


def token_norms(model: nn.Module, tower: Tower, ids: Tensor) -> Tensor:
    """L2 norms `(sequences, blocks, tokens)` of tokens at the output of every block.

    Raises:
        TestregError: a block gives NaN or infinity.
    """
    rows: list[Tensor] = []
    with outputs(
        tower, lambda index, tokens: rows.append(torch.linalg.vector_norm(tokens, dim=-1, dtype=torch.float32))
    ):
        read_text(model, tower, ids)
    norms = torch.stack([row.cpu() for row in rows], dim=1)  # (sequences, blocks, tokens)
    broken = ~norms.isfinite().all(-1).all(0)
    if broken.any():
        raise TestregError(
            f"block {int(broken.nonzero()[0])} gives NaN or infinity: the weights are broken, or "
            f"{next(model.parameters()).dtype} is too narrow for this model; load it with dtype=torch.float32."
        )
    return norms


def massive(norms: Norms, sample: Sample) -> Artefact | None:
    """Where massive tokens are; None where no token reaches ten times the median norm of its sequence.

    They are told where one stands out most, and begin at the first block from which most of these very tokens stand
    out on: other tokens may be large for a few blocks before.
    """
    largest = largest_ratio(norms)
    shown = int(largest.argmax())
    if not largest[shown] >= LEAST:
        return None
    threshold = valley(norms)
    share, sequences = shares(norms, threshold)
    outliers = torch.stack([threshold.outliers(kept.norms) for kept in sample])  # (sequences, blocks, tokens)
    same = (outliers & outliers[:, shown : shown + 1]).sum((0, 2)) >= 0.5 * outliers[:, shown].sum()  # (blocks,)
    block = shown
    while block and same[block - 1]:
        block -= 1
    return Artefact(threshold, block, shown, float(share[shown]), float(sequences[shown]))


def places(kept: Iterable[Kept], found: Artefact) -> Tensor:
    """Share of the massive tokens at each place of a sequence `(tokens,)`."""
    counts = torch.stack([found.threshold.outliers(one.norms[found.shown]) for one in kept]).float().sum(0)
    return counts / counts.sum().clamp(min=1)


def rows_at(model: nn.Module, tower: Tower, ids: Tensor, where: Tensor) -> Tensor:
    """What every attention is given, `(blocks, tokens, channels)`, for the tokens of `ids` at `where`, a mask."""
    seen: list[Tensor] = []
    with inputs(tower, lambda index, tokens: seen.append(tokens[where.to(tokens.device)].float().cpu())):
        read_text(model, tower, ids)
    return torch.stack(seen)


@contextmanager
def inputs(tower: Tower, read: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Inside the `with`, `read(block, tokens)` gets what every attention is given `(batch, tokens, channels)`."""

    def hook(index: int) -> Any:
        return lambda module, args, kwargs: read(index, args[0] if args else kwargs["hidden_states"])

    handles = [
        attention.register_forward_pre_hook(hook(index), with_kwargs=True)
        for index, attention in enumerate(tower.attentions)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def peak(norms: Tensor, block: int) -> float:
    """The largest norm over the median of its sequence, of norms `(sequences, blocks, tokens)`, from `block` on."""
    return float(relative(norms[:, block:]).max())


def _keep(name: str, sequence: Tensor, norms: Tensor) -> Kept:
    return Kept(name, norms.clone(), torch.empty(0), OnDisk({"input_ids": sequence[None].clone()}))
