"""Try a plan on kept images: what it leaves of the outliers, and how far it takes the model from what it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ..runtime.installer import patch
from ..runtime.plan import RegisterPlan
from ..runtime.towers import Tower
from .observe import run
from .scan import Kept, Look, look, relative, stack, together


@dataclass(frozen=True)
class Threshold:
    """From which norm on a patch is an outlier.

    Attributes:
        times: above this multiple of the median norm of the patches of its image, at the output of the same block.
        norm: and above this norm in the units of the residual stream, where a user set one.
    """

    times: float
    norm: float = 0.0

    def outliers(self, norms: Tensor) -> Tensor:
        """Which patches are outliers, by their norms `(..., patches)`."""
        return (relative(norms) > self.times) & (norms > self.norm)

    def __str__(self) -> str:
        return f"norm {self.norm:g}" if self.norm else f"{self.times:.1f} times the median norm of an image"


HELD = 2  # blocks whose inputs are kept
NOISE = 1e-5  # drift that rounding can make up


@dataclass(frozen=True)
class Score:
    """Patched against unpatched, over the images of a trial.

    Attributes:
        left: share of outlier patches at the worst block, 0..1.
        cosine: mean cosine of logits or pooled output, -1..1.
        agreement: share of images whose largest logit, or channel of the pooled output, stays the same, 0..1.
        features: mean cosine of the ordinary patches after the last block, -1..1.
        error: standard error of `cosine`.
        images: how many there were.
    """

    left: float
    cosine: float
    agreement: float
    features: float
    error: float = 0.0
    images: int = 0

    @property
    def drift(self) -> float:
        """How far from the unpatched model: output and ordinary patches count alike. What could be noise is equal."""
        return max(NOISE, (1 - self.cosine) + (1 - self.features))


class Bench:
    """Tries plans on the same images; what happens before the first block that a plan touches is computed once.

    Args:
        threshold: what an outlier is.
        block: the block at whose output outliers first appear; they are counted from there on.
        first: the earliest block that plans to come will touch first, where that is known.
        once: no more than one plan is tried, so that nothing is kept for the next.

    Attributes:
        before: share of outlier patches at the worst block of the unpatched model.
    """

    def __init__(
        self,
        model: nn.Module,
        tower: Tower,
        images: list[Kept],
        threshold: Threshold,
        block: int,
        batch_size: int,
        first: int | None = None,
        *,
        once: bool = False,
    ):
        self.model, self.tower, self.threshold, self.block = model, tower, threshold, block
        self.first, self.once = first, once
        self.batches = list(together(images, batch_size))
        outliers = [threshold.outliers(image.norms[block:]) for image in images]  # each (blocks, patches)
        self.before = float(torch.stack([row.float().mean(1) for row in outliers]).mean(0).max())
        self._held: dict[int, dict[int, Any]] = {}  # block -> batch -> what the block before it gives
        self._scores: list[tuple[RegisterPlan, Score]] = []

    def score(self, plan: RegisterPlan) -> Score:
        """The model with `plan` against the model as it was when the images were kept; once for each plan."""
        for known, score in self._scores:
            if known == plan:
                return score
        self._scores.append((plan, self._score(plan)))
        return self._scores[-1][1]

    def _score(self, plan: RegisterPlan) -> Score:
        left, rows = torch.zeros(len(self.tower.blocks)), []
        patches = 0
        first = 0 if self.once else min([plan.entry, *plan.neurons])
        for index, batch in enumerate(self.batches):
            with self._resumed(index, batch, first), patch(self.model, plan):
                seen = look(self.model, self.tower, stack(batch))
            outliers = self.threshold.outliers(seen.norms)
            left += outliers.sum((0, 2)).cpu()
            patches += len(batch) * outliers.shape[-1]
            rows += [
                _compare(seen, i, image, self.threshold.outliers(image.norms)[self.block :])
                for i, image in enumerate(batch)
            ]
        values = torch.tensor(rows, dtype=torch.float64)  # (images, 3)
        cosine, same, features = values.mean(0).tolist()
        error = float(values[:, 0].std()) / len(rows) ** 0.5 if len(rows) > 1 else 0.0
        share = float(left[self.block :].max()) / patches
        return Score(share, cosine, same, features, error, len(rows))

    @contextmanager
    def _resumed(self, index: int, batch: list[Kept], block: int) -> Iterator[None]:
        """The blocks before `block` do nothing, and the last of them gives what it gave the unpatched model."""
        start = self._start(block)
        held = self._held[start] if start else {}
        if start and index not in held:
            held[index] = self._output(batch, start - 1)
        blocks = self.tower.blocks[:start]
        before = [module.__dict__.get("forward") for module in blocks]
        try:
            for module in blocks:
                module.forward = _Idle(held[index], last=module is blocks[-1])
            yield
        finally:
            for module, forward in zip(blocks, before, strict=True):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward

    def _start(self, block: int) -> int:
        """Where to begin, for a plan that touches `block` first: as late as inputs are held for, which are few."""
        if near := [first for first in self._held if _near(first, block)]:
            return max(near)
        start = self.first if self.first is not None and _near(self.first, block) else block
        if start:
            while len(self._held) >= HELD:
                self._held.popitem()
            self._held[start] = {}
        return start

    def _output(self, batch: list[Kept], block: int) -> Any:
        """What a block of the unpatched model gives, a tensor or a tuple."""
        found: list[Any] = []

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output)
            raise Enough

        handle = self.tower.blocks[block].register_forward_hook(hook)
        try:
            with suppress(Enough):
                run(self.model, stack(batch))
        finally:
            handle.remove()
        return found[0]


def _near(first: int, block: int) -> bool:
    """Whether inputs of block `first` serve a plan that touches `block` first: not all of its blocks run again."""
    return first <= block < 2 * first


class Enough(Exception):
    """Ends a forward pass from a hook, where what follows is not needed."""


class _Idle:
    """A block's forward that hands its tokens on as they are; the last of several gives what is known instead."""

    def __init__(self, known: Any, *, last: bool):
        self.known, self.last = known, last

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.last:
            return self.known
        return (hidden_states, *self.known[1:]) if isinstance(self.known, tuple) else hidden_states


def _compare(seen: Look, index: int, image: Kept, outliers: Tensor) -> tuple[float, float, float]:
    """Cosine of the output, whether its maximum stays, and cosine of the ordinary patches.

    Args:
        outliers: which patches are outliers of the unpatched model, `(blocks, patches)`; ordinary ones are at no block.
    """
    output, features = seen.output[index].cpu(), seen.features[index].cpu()
    step = -(-outliers.shape[-1] // len(features))
    ordinary = ~outliers.any(0)[::step]  # (some patches,)
    cosine = cosine_similarity(output, image.output, dim=0)
    same = output.argmax() == image.output.argmax()
    kept = cosine_similarity(features, image.features)[ordinary]  # (some ordinary patches,)
    return float(cosine), float(same), float(kept.mean()) if len(kept) else 1.0
