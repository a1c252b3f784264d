"""What `inspect` finds in a causal language model, and what can be done about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..metrics.sinks import EPSILON

FIRST = 4  # tokens that are looked at by their place: as many as StreamingLLM keeps (arXiv 2309.17453)
COMMON = 0.05  # of the heads: a token that is a sink in fewer is none of the model


@dataclass(frozen=True)
class TextBlock:
    """One block.

    Attributes:
        median, largest: norms of tokens after it.
        activation: the largest magnitude of one channel after it, and `times` the median magnitude of its sequence.
        massive: share of sequences with a massive activation after it, 0..1.
        sink: share of its heads in which the first token is a sink; None where it does not attend by softmax.
        received: attention that the first token gets from the mean query, mean over heads; None as `sink`.
    """

    median: float
    largest: float
    activation: float
    times: float
    massive: float
    sink: float | None
    received: float | None


@dataclass(frozen=True)
class TextInspection:
    """Attention sinks and massive activations of a causal language model.

    Attributes:
        kind: "plain", "gated" (its attention gates what a head gives) or "sink logits" (the softmax has a learned term
            that belongs to no token).
        rates: sink rate of each of the first tokens: in what share of layers and heads it is a sink.
        elsewhere: sink rate of the strongest token of a sequence's first half behind these, mean over sequences.
        taken: share of the attention that goes to no token.
        blocks: one row per block.
        sequences, tokens: how many were looked at, and the length of each.
        registers: how many the model has by a patch.
    """

    kind: str
    rates: tuple[float, ...]
    elsewhere: float
    taken: float
    blocks: tuple[TextBlock, ...]
    sequences: int
    tokens: int
    registers: int = 0

    @property
    def sinks(self) -> bool:
        """Whether there are sinks."""
        return max(*self.rates, self.elsewhere) >= COMMON

    @property
    def first(self) -> float:
        """Attention that the first token gets from the mean query, mean over the blocks that attend by softmax."""
        received = [block.received for block in self.blocks if block.received is not None]
        return sum(received) / max(1, len(received))

    @property
    def verdict(self) -> str:
        """What was found, and what can be done."""
        most = max(range(len(self.rates)), key=self.rates.__getitem__)
        where, rate = f"token {most}", self.rates[most]
        if self.elsewhere > rate:
            where, rate = f"a token behind the first {FIRST}", self.elsewhere
        found = f"{where} gets more than {EPSILON:.0%} of the attention in {rate:.0%} of the heads"
        none = f"no token gets more than {EPSILON:.0%} of the attention in {COMMON:.0%} of the heads or more"
        keep = f"a cache that is cut has to keep the first {FIRST} tokens (StreamingLLM, arXiv 2309.17453)"
        massive = [index for index, block in enumerate(self.blocks) if block.massive]
        if self.registers:
            many = f"{self.registers} register{'s' * (self.registers > 1)}"
            told = found if self.sinks else none
            said = f"Patched: {many} get {self.taken:.0%} of the attention. Of the tokens, {told}."
        elif self.kind == "gated":
            said = "Gated attention (arXiv 2505.06708): a head closes its gate instead of attending to a sink. " + (
                f"Yet there are sinks: {found}; {keep}." if self.sinks else f"Indeed {none}. Nothing to do."
            )
        elif self.kind == "sink logits":
            said = f"Sink logits: a learned term of the softmax takes {self.taken:.0%} of the attention. " + (
                f"Yet there are sinks: {found}; {keep}."
                if self.sinks
                else f"Indeed {none}. Nothing to do; an attention kernel without this term would change the model."
            )
        elif self.sinks:
            put = "`testreg patch MODEL --text FILE --out DIR` puts a register in its place; without, "
            said = f"Softmax sinks are there: {found}. {put if massive else ''}{keep}."
        else:
            said = f"No softmax sinks: {none}. Nothing to do."
        softmax = sum(block.sink is not None for block in self.blocks)
        if softmax < len(self.blocks):
            said += f" This is about the {softmax} of {len(self.blocks)} blocks that attend by softmax."
        if massive:
            largest = max(self.blocks, key=lambda block: block.times)
            said += (
                f" Massive activations (arXiv 2402.17762) after blocks {massive[0]} to {massive[-1]}, up to "
                f"{largest.activation:.0f}, {largest.times:.0f} times the median: keep them out of a quantiser's scale."
            )
        return said

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        blocks = [{"block": index, **asdict(block)} for index, block in enumerate(self.blocks)]
        return {**asdict(self), "rates": list(self.rates), "verdict": self.verdict, "blocks": blocks}
