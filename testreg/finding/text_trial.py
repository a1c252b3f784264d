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
GIVEN, OTHERWISE = "as given", "begun otherwise"


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
    """Tries plans on the same sequences, begun as given and, where a model has a start token, begun otherwise too.

    Otherwise = with the start token in front, or without it where all begin with it. Who uses the model may do either.

    Args:
        start: the start token, if any.

    Attributes:
        before, largest: share of massive tokens at the worst block of the unpatched model, and their largest norm over
            the median, as given.
        unpatched: perplexity of it, as given.
    """

    def __init__(
        self, model: nn.Module, tower: Tower, kept: list[Kept], found: Artefact, batch_size: int, start: int | None
    ):
        self.model, self.tower, self.found = model, tower, found
        self.sequences = len(kept)
        self.begun = {GIVEN: [stack(batch)["input_ids"] for batch in together(kept, batch_size)]}
        if start is not None:
            begun = all(bool((ids[:, 0] == start).all()) for ids in self.begun[GIVEN])
            self.begun[OTHERWISE] = [ids[:, 1:] if begun else _after(start, ids) for ids in self.begun[GIVEN]]
        alone = {how: self._run(batches) for how, batches in self.begun.items()}
        self._unpatched = {how: perplexity for how, (perplexity, _) in alone.items()}
        self.unpatched, norms = alone[GIVEN]
        self.before, self.largest = self._left(norms), peak(norms, found.block)

    def scores(self, plan: RegisterPlan) -> dict[str, TextScore]:
        """What `plan` does, by how the sequences begin."""
        found = {}
        for how, batches in self.begun.items():
            perplexity, norms = self._run(batches, plan)
            found[how] = TextScore(perplexity, self._unpatched[how], self._left(norms), peak(norms, self.found.block))
        return found

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


def _after(start: int, ids: Tensor) -> Tensor:
    return torch.cat([torch.full_like(ids[:, :1], start), ids], dim=1)


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
