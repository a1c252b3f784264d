"""Registers that travel as tokens: each block is called with `[registers | tokens]` and hands back only its tokens.

The buffer that still holds the registers rides on the tensor that was handed back (a plain attribute of it), so where
the next block receives the very tensor, nothing is copied, and a block recomputed under gradient checkpointing finds
what it saw the first time.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from . import redirect
from .errors import TestregError
from .forwards import Block
from .relay import Relay, Start

BUFFER = "_testreg_buffer"  # on a tensor: [registers | tokens], where the tensor is its tokens


class Carrier(Block):
    """A block that registers pass through as tokens."""

    def __init__(self, relay: Relay, index: int, module: nn.Module, acts: int):
        super().__init__(relay, index, module, acts)
        self.last = index == len(relay.tower.blocks) - 1
        self.start = Start(relay) if index == relay.plan.entry else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.off:
            return self.original(*args, **kwargs)
        here = self.relay.here
        tokens, args = (args[0], args[1:]) if args else (kwargs.pop(self.names[0]), args)  # (batch, tokens, channels)
        joined = self._joined(tokens)
        registers = joined.shape[1] - tokens.shape[1]
        here.waiting = None  # nothing is left of a pass that ends in an error
        output = self._marked(registers, joined, *args, **kwargs)
        full = output[0] if isinstance(output, tuple) else output  # (batch, registers + tokens, channels)
        tokens = full[:, registers:]
        if self.last:
            tokens = tokens.contiguous()  # what follows the blocks may call .view
        else:
            setattr(tokens, BUFFER, full)
            here.waiting = self.index, registers, _held(full, tokens)
        if self.relay.record is not None:
            self.relay.record.registers[self.index] = full[:, :registers]
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

    def _joined(self, tokens: Tensor) -> Tensor:
        if self.start is not None:
            return redirect.join(self.start.like(tokens, self.relay.count(tokens.shape[1])), tokens)
        full = getattr(tokens, BUFFER, None)
        if full is not None and not full.requires_grad:
            return full
        # Something between the blocks made a new tensor (a hook that steers, a move to another device); or gradients
        # are wanted, which go the way that the tokens go: through the tensor that the block was given, or not at all.
        registers = self._waiting(tokens) if full is None else full[:, : full.shape[1] - tokens.shape[1]]
        return redirect.join(registers if tokens.requires_grad else registers.detach(), tokens)

    def _waiting(self, tokens: Tensor) -> Tensor:
        index, registers, held = self.relay.here.waiting or (None, 0, None)
        full = held() if isinstance(held, weakref.ref) else held
        if full is None or index != self.index - 1 or full.shape[0] != tokens.shape[0]:
            raise TestregError(
                f"block {self.index} was called without its registers: they join before block {self.relay.plan.entry} "
                f"and travel from block to block. Run the whole model; checkpoint with use_reentrant=False; remove the "
                f"patch to call a block alone; or take registers that only attention sees (form='attention')."
            )
        return full[:, :registers]


def _held(full: Tensor, tokens: Tensor) -> Any:
    """A hold on `full` that ends with the pass, where `tokens` are a part of a graph: what follows from it has it."""
    node = tokens.grad_fn
    if torch.compiler.is_compiling() or node is None:
        return full
    node.metadata[BUFFER] = full  # type: ignore[index]
    return weakref.ref(full)
