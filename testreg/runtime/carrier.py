"""Registers that travel as tokens: each block is called with `[registers | tokens]` and hands back only its tokens.

The buffer that still holds the registers rides on the tensor that was handed back (a plain attribute of it), so where
the next block receives the very tensor, nothing is copied, and a block recomputed under gradient checkpointing finds
what it saw the first time.
"""

from __future__ import annotations

import weakref
from functools import partial
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
        here, turned = self.relay.here, self.relay.tower.turned
        tokens, args = (args[0], args[1:]) if args else (kwargs.pop(self.names[0]), args)  # (batch, tokens, channels)
        if isinstance(tokens, list):  # of images of several sizes, each with its own of the other arguments
            found = [self.forward(*one, **kwargs) for one in zip(tokens, *args, strict=True)]
            here.waiting = here.waiting if len(found) == 1 else None  # whose registers they are could not be told
            return found
        joined = self._joined(tokens)
        registers = turned(joined).shape[1] - turned(tokens).shape[1]
        here.waiting = None  # nothing is left of a pass that ends in an error
        here.block, here.registers, here.real = self.index, registers, None
        try:
            output = super().forward(joined, *args, **kwargs)
        finally:
            here.block, here.registers = None, 0
        full = output[0] if isinstance(output, tuple) else output  # (batch, registers + tokens, channels)
        tokens = turned(turned(full)[:, registers:])
        if self.last:
            tokens = tokens.contiguous()  # what follows the blocks may call .view
        else:
            setattr(tokens, BUFFER, full)
            here.waiting = self.index, turned(full)[:, :registers].detach(), _held(full, tokens)
        if self.relay.record is not None:
            self.relay.record.registers[self.index] = turned(full)[:, :registers]
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

    def _joined(self, tokens: Tensor) -> Tensor:
        turned = self.relay.tower.turned
        if self.start is not None:
            given = turned(tokens)
            return turned(redirect.join(self.start.like(given, self.relay.count(given.shape[1])), given))
        full = getattr(tokens, BUFFER, None)
        if full is not None and not full.requires_grad:
            return full
        # Something between the blocks made a new tensor (a hook that steers, a move to another device); or gradients
        # are wanted, which go the way that the tokens go: through the tensor that the block was given, or not at all.
        given = turned(tokens)
        registers = self._waiting(given) if full is None else turned(full)[:, : turned(full).shape[1] - given.shape[1]]
        return turned(redirect.join(registers if tokens.requires_grad else registers.detach(), given))

    def _waiting(self, tokens: Tensor) -> Tensor:
        """The registers that the block before left, `(batch, registers, channels)`, for tokens of as many images."""
        index, registers, held = self.relay.here.waiting or (None, tokens, None)
        if held is None or index != self.index - 1 or registers.shape[0] != tokens.shape[0]:
            raise TestregError(
                f"block {self.index} was called without its registers: they join before block {self.relay.plan.entry} "
                f"and travel from block to block. Run the whole model; checkpoint with use_reentrant=False; remove the "
                f"patch to call a block alone; or take registers that only attention sees (form='attention')."
            )
        full = held()  # gone where no tensor is left that comes from it, so that no gradient can go there
        return registers if full is None else self.relay.tower.turned(full)[:, : registers.shape[1]]


def _held(full: Tensor, tokens: Tensor) -> Any:
    """A hold on `full` that ends with the graph of `tokens`: what waits for a pass that breaks off keeps no memory."""
    if torch.compiler.is_compiling():
        return partial(_itself, full)
    node = tokens.grad_fn
    if node is None:
        return _nothing
    node.metadata[BUFFER] = full  # type: ignore[index]
    return weakref.ref(full)


def _nothing() -> None:
    """For tensors without a graph."""


def _itself(full: Tensor) -> Tensor:
    return full
