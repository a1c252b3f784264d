"""A text is read into a `StreamingCache` in pieces that fit its window, each under a mask of the cache's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import TestregError
from .guard import acting_in
from .prefix import FILLED, check_masks
from .towers import Tower


class Pieces:
    """A decoder's forward that reads text into a `StreamingCache` piece by piece; with any other cache, its own.

    It stays on the model, where it does nothing without such a cache.
    """

    def __init__(self, tower: Tower):
        self.tower: Tower = tower
        self.module: Any = tower.module
        self.before = tower.module.__dict__.get("forward")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        original = self.before or type(self.module).forward.__get__(self.module)
        cache: Any = kwargs.get("past_key_values")
        if not hasattr(cache, "enter"):
            return original(*args, **kwargs)
        acting = acting_in(self.tower)
        if getattr(cache, FILLED) != (acting.plan.digest if acting else None):
            raise TestregError(
                "the model has other registers now than when this StreamingCache was made, so that its keys do not go "
                "with them: make another one."
            )
        name = "inputs_embeds" if kwargs.get("inputs_embeds") is not None else "input_ids"
        if args:
            kwargs, args = {**kwargs, name: args[0]}, args[1:]
        if args or kwargs.get("use_cache") is False:
            raise TestregError("with a StreamingCache, pass arguments by name, and leave use_cache on.")
        tokens, mask = kwargs[name], kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise TestregError("with a StreamingCache, attention_mask must be (batch, tokens): it makes its own mask.")
        size = min(cache.window, cache.limit - cache.keep - cache.window + 1)
        pieces = tokens.split(size, dim=1)
        left, outputs = tokens.shape[1], []
        for piece in pieces:
            end = None if mask is None else mask.shape[1] - left + piece.shape[1]
            positions, visible = cache.enter(piece, None if mask is None else mask[:, :end])
            told = {name: piece, "position_ids": positions, "attention_mask": self._mask(visible, piece)}
            outputs.append(original(**{**kwargs, **told}))
            cache.seen += piece.shape[1]
            left -= piece.shape[1]
        return outputs[0] if len(outputs) == 1 else _whole(outputs)

    def _mask(self, visible: Tensor, piece: Tensor) -> Tensor:
        """As the attention implementation takes it."""
        check_masks(self.module)
        if getattr(self.module.config, "_attn_implementation", None) == "sdpa":
            return visible
        dtype = self.module.get_input_embeddings().weight.dtype
        closed = torch.zeros(visible.shape, dtype=dtype, device=piece.device)
        return closed.masked_fill(~visible, torch.finfo(dtype).min)


def _whole(outputs: list[Any]) -> Any:
    """The outputs of all pieces as one; only those that have one row per token can be."""
    first = outputs[0]
    if first.get("attentions") is not None:
        raise TestregError("attention maps of a text that is read in pieces do not fit together: give shorter pieces.")
    for key, value in first.items():
        if isinstance(value, Tensor):
            first[key] = torch.cat([output[key] for output in outputs], dim=1)
        elif key == "hidden_states":
            rows = zip(*(output[key] for output in outputs), strict=True)
            first[key] = tuple(torch.cat(row, dim=1) for row in rows)
    return first
