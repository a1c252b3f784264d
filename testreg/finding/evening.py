"""Channels and tokens in front of a linear, given sizes that one scale can hold; the product stays what it was.

Channels are divided, and the weights that read them multiplied: SmoothQuant (arXiv 2211.10438), equation 4, whose alpha
says how much of the burden the weights bear; which alpha, calibration tells. Tokens behind an activation or an
attention are divided by their largest magnitude, and the product is multiplied by it again; norms make their tokens
alike by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
EACH, ROWS = 8, 256  # tokens that are kept of an image, and of all
QUIET = 1e-2  # of the median channel: no channel is taken for quieter
SMALL = 1e-5  # a channel or token that is nothing


class Seen:
    """What images have in front of a linear.

    Attributes:
        low, high: ends of each channel, `(channels,)`.
        rows: a few tokens of each of the first images, each `(some, channels)`.

    Args:
        rows: how many tokens are kept.
    """

    low: Tensor
    high: Tensor

    def __init__(self, rows: int = ROWS):
        self.most, self.images, self.rows = rows, 0, list[Tensor]()

    def add(self, tokens: Tensor) -> None:
        """The tokens `(..., channels)` of one more image."""
        tokens = tokens.flatten(0, -2)
        low, high = tokens.amin(0), tokens.amax(0)
        self.low, self.high = (
            (torch.minimum(self.low, low), torch.maximum(self.high, high)) if self.images else (low, high)
        )
        self.images += 1
        if sum(map(len, self.rows)) < self.most:
            some = (
                torch.linspace(0, len(tokens) - 1, min(EACH, len(tokens))).round().long()
            )  # first and last among them
            self.rows.append(tokens[some.to(tokens.device)])


@dataclass(frozen=True)
class Even:
    """What is done in front of a linear.

    Attributes:
        scale: what channels are divided by, `(channels,)`.
        alike: whether tokens are divided too, each by its largest magnitude.
        low, high: ends of the range then, each `()`.
    """

    scale: Tensor
    alike: bool
    low: Tensor
    high: Tensor

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `(..., channels)` with even sizes, and what they are multiplied by again, `(..., 1)` or `()`."""
        tokens = tokens / self.scale
        size = largest_of(tokens) if self.alike else torch.ones((), dtype=tokens.dtype, device=tokens.device)
        return tokens / size, size


def even(
    seen: Seen,
    weight: Tensor,
    hold: Callable[[Tensor, Tensor, Tensor], Tensor],
    hold_weight: Callable[[Tensor], Tensor],
    *,
    divide: bool,
) -> Even:
    """What makes a linear's product most exact in few bits.

    Args:
        seen: what calibration images have in front of it.
        weight: of the linear, `(outputs, channels)`.
        hold: tokens, and the ends of their range, to what few bits hold of them.
        hold_weight: the same of a weight.
        divide: whether tokens are divided too.
    """
    rows = torch.cat(seen.rows).to(weight)  # (tokens, channels)
    low, high = seen.low.to(weight), seen.high.to(weight)
    magnitude, read = torch.maximum(-low, high), weight.abs().amax(0)
    magnitude = magnitude.clamp(min=QUIET * float(magnitude.median()))  # who was silent so far may still fire
    product = rows @ weight.mT  # (tokens, outputs)
    tried = []
    for alpha in ALPHAS:
        scale = channels(magnitude, read, alpha)
        found = Even(scale, divide, (low / scale).amin(), (high / scale).amax())
        tokens, size = found(rows)
        if divide:
            found = replace(found, low=tokens.amin(), high=tokens.amax())
        off = (hold(tokens, found.low, found.high) * size) @ hold_weight(weight * scale).mT - product
        tried.append((float(off.square().mean()), found))
    return min(tried, key=lambda result: result[0])[1]


def channels(largest: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """What each channel is divided by.

    Args:
        largest: the channels' largest magnitude `(channels,)`.
        weights: that of the weights that read them `(channels,)`.
        alpha: 0..1, 1 = the weights bear all.
    """
    return largest.clamp(min=SMALL) ** alpha / weights.clamp(min=SMALL) ** (1 - alpha)


def largest_of(tokens: Tensor) -> Tensor:
    """Each token's largest magnitude, `(..., 1)` of `(..., channels)`."""
    return tokens.abs().amax(-1, keepdim=True).clamp(min=SMALL)
