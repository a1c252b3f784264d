"""The intervention, as pure functions of tensors.

Source: Jiang et al., "Vision Transformers Don't Need Trained Registers" (NeurIPS 2025), section 4. Registers stand in
front of the sequence: `[registers | class and other prefix tokens | patches]`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def join(registers: Tensor, tokens: Tensor) -> Tensor:
    """Registers `(1 or batch, registers, channels)` in front of tokens `(batch, tokens, channels)`."""
    registers = registers.to(tokens).expand(tokens.shape[0], -1, -1)
    return torch.cat([registers, tokens], dim=1)  # (batch, registers + tokens, channels)


def move(activation: Tensor, neurons: Tensor, registers: int, *, fill: bool) -> Tensor:
    """Neuron activations `(batch, registers + tokens, all neurons)` with those of `neurons` taken away from the tokens.

    Args:
        neurons: indices `(neurons,)` of the register neurons.
        registers: how many tokens at the front are registers.
        fill: give every register the neuron's maximum over all tokens and registers, one per neuron and image (the
            dynamic form); otherwise registers keep what they have (the constant form). The registers take part in the
            maximum: where register neurons form a chain over several blocks, a register fires the later ones itself.
    """
    picked = activation.index_select(-1, neurons)  # (batch, registers + tokens, neurons)
    kept = picked[:, :registers]  # (batch, registers, neurons)
    if fill and registers:
        kept = picked.amax(dim=1, keepdim=True).expand_as(kept)
    moved = torch.cat([kept, torch.zeros_like(picked[:, registers:])], dim=1)
    return activation.index_copy(-1, neurons, moved)


def grow(mask: Tensor, registers: int, tokens: int) -> Tensor:
    """An attention mask with room for `registers` more tokens in front, which everyone may attend to.

    Args:
        mask: boolean (True = attend) or additive, `(batch, keys)`, or `(batch, heads or 1, queries or 1, keys)`.
        tokens: the length of the sequence without registers; axes of another length are left alone.
    """
    value = True if mask.dtype == torch.bool else (1 if not mask.is_floating_point() else 0)
    rows = registers if mask.ndim > 2 and mask.shape[-2] == tokens else 0
    columns = registers if mask.shape[-1] == tokens else 0
    return torch.nn.functional.pad(mask, (columns, 0, rows, 0) if mask.ndim > 2 else (columns, 0), value=value)
