"""The intervention, as pure functions of tensors.

Source: Jiang et al., "Vision Transformers Don't Need Trained Registers" (NeurIPS 2025), section 4. Registers stand in
front of the sequence: `[registers | class and other prefix tokens | patches]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def join(registers: Tensor, tokens: Tensor) -> Tensor:
    """Registers `(1 or batch, registers, channels)` in front of tokens `(batch, tokens, channels)`."""
    registers = registers.to(tokens).expand(tokens.shape[0], -1, -1)
    return torch.cat([registers, tokens], dim=1)  # (batch, registers + tokens, channels)


def dealt(state: Tensor, count: Any) -> Tensor:
    """Rows `(count, channels)` of `state` `(rows, channels)`, each as often as it has its share in it."""
    at = torch.arange(count, device=state.device)  # (count,)
    return state[(2 * at + 1) * len(state) // (2 * count)]


def rest(activation: Tensor, neurons: Tensor, value: Tensor) -> Tensor:
    """Neuron activations `(..., all neurons)` in which `neurons` `(neurons,)` have their `value` `(neurons,)`."""
    return activation.index_copy(-1, neurons, value.expand(activation.shape[:-1] + value.shape))


def move(
    activation: Tensor, neurons: Tensor, registers: Any, rest: Tensor, *, fill: bool, real: Tensor | None = None
) -> Tensor:
    """Neuron activations `(batch, registers + tokens, all neurons)` with those of `neurons` taken away from the tokens.

    Args:
        neurons: indices `(neurons,)` of the register neurons.
        registers: how many tokens at the front are registers.
        rest: what the other tokens have instead, `(neurons,)`.
        fill: give every register the neuron's maximum over all tokens and registers, one per neuron and image (the
            dynamic form); otherwise registers keep what they have (the constant form). The registers take part in the
            maximum: where register neurons form a chain over several blocks, a register fires the later ones itself.
        real: `(1 or batch, registers + tokens)`, False where a token is padding, whose activation means nothing.
    """
    # Few and small operations, then one copy: a block's activation is the largest tensor there is.
    picked = activation.index_select(-1, neurons)  # (batch, registers + tokens, neurons)
    kept = picked[:, :registers]  # (batch, registers, neurons)
    if fill:
        held = picked if real is None else picked.masked_fill(~real[..., None], torch.finfo(picked.dtype).min)
        kept = held.amax(dim=1, keepdim=True).expand_as(kept)
    moved = torch.cat([kept, rest.expand_as(picked[:, registers:])], dim=1)
    return activation.index_copy(-1, neurons, moved)


def grow(mask: Tensor, registers: Any, tokens: Any, *, square: bool = False, bias: Tensor | None = None) -> Tensor:
    """An attention mask or position bias with room for `registers` more tokens in front.

    Everyone may attend to the registers, and they to every token that is not padding.

    Args:
        mask: boolean (True = attend) or additive, `(batch, keys)`, or `(batch, heads or 1, queries or 1, keys)`.
        tokens: the length of the sequence without registers; axes of another length are left alone.
        square: two dimensions are `(queries, keys)`.
        bias: the position bias in an additive mask, if any. What else was added to it is 0 for a key that may be
            attended to, or 1 where a mask of booleans was added as it is; registers get as much.
    """
    if mask.shape[-1] == tokens:
        if mask.is_floating_point() and bias is not None and mask is not bias and mask.ndim == bias.ndim:
            front = (mask - bias).amax(-1, keepdim=True)  # (batch, heads, queries, 1)
            mask = torch.cat([front.expand(*front.shape[:-1], registers), mask], dim=-1)
        else:
            mask = pad(mask, (registers, 0), value=0 if mask.is_floating_point() else 1)  # (..., registers + keys)
    if (square or mask.ndim > 2) and mask.shape[-2] == tokens:
        seen = _open(mask).any(-2, keepdim=True)  # (batch, heads or 1, 1, registers + keys)
        rows = (
            torch.zeros_like(mask[..., :1, :]).masked_fill(~seen, _closed(mask)) if mask.is_floating_point() else seen
        )
        mask = torch.cat([rows.to(mask.dtype).expand(*mask.shape[:-2], registers, -1), mask], dim=-2)
    return mask


def grow_blocks(mask: Any, registers: Any, tokens: Any) -> Any:
    """A flex attention block mask, grown as `grow` grows others; what is no block mask is left alone."""
    if type(mask).__name__ != "BlockMask":
        return mask
    from torch.nn.attention.flex_attention import create_block_mask

    may = mask.mask_mod

    def grown(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        asks = may(batch, head, (query - registers).clamp(min=0), (key - registers).clamp(min=0))
        allowed: Tensor = (key < registers) | asks
        return allowed

    batch, heads, queries, keys = mask.shape
    sizes = {"B": batch, "H": heads, "Q_LEN": queries + registers, "KV_LEN": keys + registers}
    return create_block_mask(grown, **sizes, device=mask.kv_num_blocks.device, BLOCK_SIZE=mask.BLOCK_SIZE)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True = attend) as one to add."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def real(mask: Any, *, square: bool = False) -> Tensor:
    """Which tokens are not padding, `(batch or 1, keys)`: those that anyone may attend to under a mask as in `grow` or
    in `grow_blocks`."""
    seen = _open(mask) if isinstance(mask, Tensor) else _dense(mask)
    if seen.ndim == 2:
        return seen.any(0, keepdim=True) if square else seen
    return seen.flatten(1, -2).any(1)


def _dense(mask: Any) -> Tensor:
    """A flex attention block mask as booleans `(batch, heads, queries, keys)`."""
    from torch.nn.attention.flex_attention import create_mask

    batch, heads, queries, keys = mask.shape
    device = str(mask.kv_num_blocks.device)
    return create_mask(mask.mask_mod, B=batch, H=heads, Q_LEN=queries, KV_LEN=keys, device=device)


def _open(mask: Tensor) -> Tensor:
    return mask > _closed(mask) / 2 if mask.is_floating_point() else mask.bool()


def _closed(mask: Tensor) -> float:
    return torch.finfo(mask.dtype).min


def unturned(rope: Any, registers: int) -> Any:
    """A rotary table for the last tokens of the sequence, with `registers` rows in front that turn nothing.

    Args:
        rope: a pair (cosines, sines) of `(..., rows, channels)`, or one tensor with sines and cosines side by side.
    """
    if isinstance(rope, Tensor):
        sines, cosines = rope.chunk(2, dim=-1)
        return torch.cat([pad(sines, (0, 0, registers, 0)), pad(cosines, (0, 0, registers, 0), value=1.0)], dim=-1)
    cosines, sines = rope
    return pad(cosines, (0, 0, registers, 0), value=1.0), pad(sines, (0, 0, registers, 0))


def beside(turn: Any, registers: Any, *values: Tensor, **kwargs: Any) -> Any:
    """Queries or keys, each `(batch, heads, registers + tokens, channels)`, of which `turn` turns the tokens alone."""
    turned = turn(*(value[..., registers:, :] for value in values), **kwargs)
    several = isinstance(turned, (tuple, list))
    whole = [
        torch.cat([value[..., :registers, :], part], dim=-2)
        for value, part in zip(values, turned if several else [turned], strict=True)
    ]
    return tuple(whole) if several else whole[0]


def positions(given: Tensor | None, registers: int, tokens: Tensor) -> Tensor:
    """Positions `(batch, registers + tokens)` of the tokens, by default their order; registers stand at 0.

    Args:
        given: positions `(batch, tokens)`, if any.
        tokens: the sequence `(batch, registers + tokens, channels)`.
    """
    if given is None:
        given = torch.arange(tokens.shape[1] - registers, device=tokens.device).expand(tokens.shape[0], -1)
    return pad(given, (registers, 0))
