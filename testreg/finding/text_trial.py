"""Try a plan on kept text: what it leaves of the massive tokens, and what it does to the next token's likelihood."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.installer import patch
from ..runtime.plan import RegisterPlan
from ..runtime.towers import Tower
from .detect import Artefact
from .massive import peak
from .scan import Kept, outputs, stack, together

NOISE = 1e-4  # drift that rounding can make up


@dataclass(frozen=True)
class TextScore:
    """A language model with a plan against the model without, over the sequences of a trial.

    Attributes:
        perplexity: of the next token.
        unpatched: without the plan.
        left: share of massive tokens at the worst block, from the one on where they begin, 0..1.
        largest: the largest norm over the median of its sequence, from there on.
    """

    perplexity: float
    unpatched: float
    left: float
    largest: float

    @property
    def drift(self) -> float:
        """How far from the unpatched model, in nats a token; better counts as well as equal."""
        return max(NOISE, math.log(self.perplexity / self.unpatched)) if self.perplexity > 0 else math.inf


class TextBench:
    """Tries plans on the same sequences.

    Attributes:
        before: share of massive tokens at the worst block of the unpatched model.
        unpatched: perplexity of it.
    """

    def __init__(self, model: nn.Module, tower: Tower, kept: list[Kept], found: Artefact, batch_size: int):
        self.model, self.tower, self.found = model, tower, found
        self.batches = [stack(batch)["input_ids"] for batch in together(kept, batch_size)]
        self.sequences = len(kept)
        self.unpatched, norms = self._run(self.batches)
        self.before, self.largest = self._left(norms), peak(norms, found.block)

    def score(self, plan: RegisterPlan) -> TextScore:
        """What `plan` does."""
        perplexity, norms = self._run(self.batches, plan)
        return TextScore(perplexity, self.unpatched, self._left(norms), peak(norms, self.found.block))

    def begun_otherwise(self, plan: RegisterPlan, start: int) -> TextScore:
        """What `plan` does where the same text begins with the token `start`, or without it where it does as it is."""
        batches = [
            ids[:, 1:] if bool((ids[:, 0] == start).all()) else torch.cat([torch.full_like(ids[:, :1], start), ids], 1)
            for ids in self.batches
        ]
        unpatched, _ = self._run(batches)
        perplexity, norms = self._run(batches, plan)
        return TextScore(perplexity, unpatched, self._left(norms), peak(norms, self.found.block))

    def _left(self, norms: Tensor) -> float:
        outliers = self.found.threshold.outliers(norms[:, self.found.block :])  # (sequences, blocks, tokens)
        return float(outliers.float().mean((0, 2)).max())

    def _run(self, batches: list[Tensor], plan: RegisterPlan | None = None) -> tuple[float, Tensor]:
        """Perplexity, and norms `(sequences, blocks, tokens)`."""
        losses, tokens, norms = 0.0, 0, []
        with patch(self.model, plan) if plan else nullcontext():
            for ids in batches:
                rows: list[Tensor] = []

                def read(index: int, states: Tensor, rows: list[Tensor] = rows) -> None:
                    rows.append(torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32).cpu())

                with outputs(self.tower, read):
                    found = losses_of(self.model, ids)
                losses, tokens = losses + float(found.double().sum()), tokens + found.numel()
                norms.append(torch.stack(rows, dim=1))
        return perplexity_of(losses, tokens), torch.cat(norms)


def losses_of(model: Any, ids: Tensor) -> Tensor:
    """Negative log likelihood `(sequences, tokens - 1)`, in nats, of ids `(sequences, tokens)` given those before."""
    ids = ids.to(model.get_input_embeddings().weight.device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # (sequences, tokens - 1, words)
    rows = [
        nn.functional.cross_entropy(row.float(), answer, reduction="none")
        for row, answer in zip(logits, ids[:, 1:], strict=True)
    ]
    return torch.stack(rows).cpu()


def perplexity_of(losses: float, tokens: int) -> float:
    """e to the mean loss; infinite where that is no number."""
    mean = losses / max(1, tokens)
    return math.exp(min(mean, 700.0)) if math.isfinite(mean) else math.inf
