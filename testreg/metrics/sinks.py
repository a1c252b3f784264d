"""Attention sinks, by the definition of arXiv 2410.10781, section 3.1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 0.3  # the paper's


@dataclass(frozen=True)
class Sinks:
    """Sinks of a vision tower, mean over images; shares of 1.

    Attributes:
        rate: sink rate of the patch that has most: over how many of the layers and heads it is a sink.
        largest: the most attention that one patch gets from the mean query, mean over layers and heads.
        class_token: attention that the prefix tokens get from the mean query, mean over layers and heads.
        registers: attention that leaves the sequence for test-time registers.
    """

    rate: Tensor
    largest: Tensor
    class_token: Tensor
    registers: Tensor


def received(attention: Tensor, *, causal: bool = False) -> Tensor:
    """alpha: the attention `(..., queries, keys)` that each key gets from the mean query, `(..., keys)`.

    Args:
        causal: only queries from a key on can see it, so the mean is over those.
    """
    keys = attention.shape[-1]
    queries = torch.arange(keys, 0, -1, device=attention.device) if causal else attention.shape[-2]
    return attention.float().sum(dim=-2) / queries


def sink_rate(attention: Tensor, *, epsilon: float = EPSILON, causal: bool = False) -> Tensor:
    """Share of layers and heads in which a key is a sink, `(batch, keys)`, of maps `(layers, batch, heads, q, k)`."""
    return (received(attention, causal=causal) > epsilon).float().mean(dim=(0, 2))


def sinks(attention: Tensor, prefix: int, *, epsilon: float = EPSILON) -> Sinks:
    """Sinks per image, each field `(batch,)`, of maps `(layers, batch, heads, tokens, tokens)` without registers.

    Args:
        prefix: tokens in front of the patches. Rows may sum to less than 1: registers took the rest.
    """
    alpha = received(attention)  # (layers, batch, heads, tokens)
    patches = alpha[..., prefix:]
    return Sinks(
        rate=(patches > epsilon).float().mean(dim=(0, 2)).amax(dim=-1),
        largest=patches.amax(dim=-1).mean(dim=(0, 2)),
        class_token=alpha[..., :prefix].sum(dim=-1).mean(dim=(0, 2)),
        registers=(1 - alpha.sum(dim=-1)).clamp(min=0).mean(dim=(0, 2)),
    )
