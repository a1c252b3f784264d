"""Attention maps of packed towers, whose attentions compute them image by image and hand none on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
