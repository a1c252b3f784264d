"""Values that a few bits can hold, by torch's own fake-quantise operators."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-12  # a scale; a tensor of zeros has one too


def rounded(tokens: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """A linear's input `(..., channels)` with a zero point, in 2 to 8 bits.

    Args:
        low, high: ends of the range, `()` for all tokens together or `(tokens,)`, one for each.
    """
    end = 2**bits - 1
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)  # zero is always among the values
    scale = ((high - low) / end).clamp(min=SMALLEST)
    zero = (-low / scale).round().clamp(0, end).to(torch.int32)
    if not low.ndim:
        return torch.fake_quantize_per_tensor_affine(tokens, scale, zero, 0, end)
    rows = tokens.flatten(0, -2)  # (tokens, channels)
    return torch.fake_quantize_per_channel_affine(rows, scale, zero, 0, 0, end).view_as(tokens)


def rounded_weight(weight: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """A weight, symmetric, in 2 to 8 bits.

    Args:
        axis: that of the output channels, each of which has a scale of its own; None = one for all.
    """
    end = 2 ** (bits - 1) - 1
    largest = weight.abs().amax() if axis is None else weight.abs().amax(1 - axis)  # () or (channels,)
    scale = (largest.float() / end).clamp(min=SMALLEST)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(weight, scale, zero, -end, end)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, axis, -end, end)
