"""Attention maps of attentions that compute them and hand none on: of packed towers, and of makers' own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..runtime import Tower

NAME = "testreg_maps"  # of an attention implementation that leaves its maps here
LEFT = "_testreg_maps"  # on an attention: one map per segment `(1, heads, tokens, tokens)`, registers in front


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **given: Any
) -> tuple[Tensor, Tensor]:
    """Attention as transformers calls it, `(1, heads, tokens, channels)` each; its map stays on `module`."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scores = query @ key.mT * (given.get("scaling") or query.shape[-1] ** -0.5)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    vars(module).setdefault(LEFT, []).append(weights)
    return (weights @ value).transpose(1, 2).contiguous(), weights


@contextmanager
def leaving(tower: Tower) -> Iterator[None]:
    """Inside the `with`, the tower's attentions leave their maps; as they were afterwards."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    module: Any = tower.module
    before = module.config._attn_implementation
    module.set_attn_implementation(NAME)
    try:
        yield
    finally:
        module.set_attn_implementation(before)
        for attention in tower.attentions:
            vars(attention).pop(LEFT, None)


def collected(attention: nn.Module, segments: Tensor) -> Tensor | None:
    """The map of all tokens `(1, heads, tokens, tokens)`, 0 between segments and without registers; and forget it.

    Args:
        segments: where each begins and ends without registers, `(segments + 1,)`.
    """
    left: list[Tensor] = vars(attention).pop(LEFT, [])
    bounds = segments.tolist()
    if len(left) != len(bounds) - 1:
        return None
    whole = left[0].new_zeros(*left[0].shape[:2], bounds[-1], bounds[-1])
    for start, end, part in zip(bounds, bounds[1:], left, strict=False):
        whole[..., start:end, start:end] = part[..., start - end :, start - end :]
    return whole


class Ear:
    """Hears the maps of one attention at a time: what passes its dropout, or what torch's own attention would compute.

    The latter only where the attention finds `scaled_dot_product_attention` in `torch.nn.functional`, as most do.
    """

    def __init__(self) -> None:
        self.heard: list[Tensor] | None = None
        self.registers: Callable[[], int] = int

    def listen(self, registers: Callable[[], int]) -> None:
        """From now on.

        Args:
            registers: how many are in front of the tokens inside the attention.
        """
        self.heard, self.registers = [], registers

    def hear(self, weights: Tensor) -> None:
        """A map `(batch, heads, registers + tokens, registers + tokens)`."""
        if self.heard is not None and weights.ndim == 4:
            registers = self.registers()
            self.heard.append(weights[..., registers:, registers:])

    def taken(self) -> Tensor | None:
        """The one map that was heard, `(batch, heads, tokens, tokens)`; None where there was none, or several."""
        heard, self.heard = self.heard or [], None
        return heard[0] if len(heard) == 1 else None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside the `with`, torch's own attention is computed in steps while anyone listens."""
        fused = functional.scaled_dot_product_attention

        def in_steps(
            query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **given: Any
        ) -> Tensor:
            if self.heard is None or args or given.get("is_causal") or given.get("enable_gqa"):
                return fused(query, key, value, attn_mask, *args, **given)
            scores = query @ key.mT * (given.get("scale") or query.shape[-1] ** -0.5)
            if attn_mask is not None:
                closed = attn_mask.dtype == torch.bool
                scores = scores.masked_fill(~attn_mask, float("-inf")) if closed else scores + attn_mask
            weights = scores.softmax(-1)
            self.hear(weights)
            return weights @ value

        functional.scaled_dot_product_attention = in_steps
        try:
            yield
        finally:
            functional.scaled_dot_product_attention = fused
