"""Registers in front of every image's segment of a packed sequence, as pure functions of tensors.

A packed tower takes the tokens of all images as one sequence, and a list of where each image begins and ends in it,
which its attention does not look across. Videos are one segment per frame, windows one segment each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Places:
    """Where everything stands in a packed sequence with registers in front of each of its segments.

    Attributes:
        segments: where each segment begins and ends there, `(segments + 1,)`.
        tokens: where the tokens are, `(tokens,)`.
        sources: which row of `[registers | tokens]` stands at each place, `(tokens + all registers,)`.
        registers: how many rows the former are.
        most: how many of them are in front of a segment, at most.
    """

    segments: Tensor
    tokens: Tensor
    sources: Tensor
    registers: int
    most: int


def places(segments: Tensor, tokens: int, registers: int, counts: list[int] | None = None) -> Places:
    """Where `registers` rows go in front of each segment of a sequence of `tokens`.

    Args:
        segments: where each begins and ends, `(segments + 1,)`, as in `cu_seqlens`.
        counts: how many of the rows are in front of each segment, where not all of them once: each as often as it has
            its share in them.
    """
    device, many = segments.device, len(segments) - 1
    each = torch.full((many,), registers, device=device) if counts is None else torch.tensor(counts, device=device)
    more = each.cumsum(0)  # (segments,): registers up to and with each segment
    grown = segments.long() + pad(more, (1, 0))  # (segments + 1,)
    place = torch.arange(tokens, device=device)
    kept = place + more[torch.searchsorted(segments[1:].long().contiguous(), place, right=True)]
    place = torch.arange(tokens + (many * registers if counts is None else sum(counts)), device=device)
    segment = torch.searchsorted(grown[1:].contiguous(), place, right=True)
    offset = place - grown[segment]  # from where its segment begins
    share = each[segment]
    dealt = (2 * offset + 1) * registers // (2 * share).clamp(min=1)  # which of the rows, as `redirect.dealt` has it
    sources = torch.where(offset < share, dealt, registers + place - more[segment])
    most = registers if counts is None else max(counts, default=0)
    return Places(grown.to(segments.dtype), kept, sources, registers, most)


def join(registers: Tensor, tokens: Tensor, at: Places) -> Tensor:
    """Registers `(registers, channels)` among tokens `(..., tokens, channels)`, in front of every segment."""
    registers = registers.to(tokens).expand(*tokens.shape[:-2], -1, -1)
    return torch.cat([registers, tokens], dim=-2).index_select(
        -2, at.sources
    )  # (..., tokens + all registers, channels)


def leave(output: Tensor, at: Places) -> Tensor:
    """The tokens' rows of an output `(..., tokens + all registers, channels)`."""
    return output.index_select(-2, at.tokens)


def leave_both(maps: Tensor, at: Places) -> Tensor:
    """Attention maps `(..., tokens + all registers, tokens + all registers)` between the tokens alone."""
    return maps.index_select(-2, at.tokens).index_select(-1, at.tokens)


def unturned(rope: Any, at: Places) -> Any:
    """A rotary table with rows that turn nothing at the registers' places.

    Args:
        rope: a pair (cosines, sines), each `(..., tokens, channels)`.
    """
    cosines, sines = rope
    shape = (at.registers, cosines.shape[-1])
    return join(cosines.new_ones(shape), cosines, at), join(sines.new_zeros(shape), sines, at)


def longest(given: Any, at: Places) -> Any:
    """The length of the longest segment, a number or a tensor, if any is given, with registers in front of it."""
    return None if given is None else given + at.most
