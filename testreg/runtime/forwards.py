"""What blocks, attentions and second linears do while registers are on.

Each block is called with `[registers | tokens]` and hands back only its tokens, so that nothing outside the blocks
ever counts a token more. The buffer that still holds the registers rides on the tensor that was handed back (a plain
attribute of it), so the state belongs to the call, not to the model: threads can share a model, a block recomputed
under gradient checkpointing finds what it saw the first time, and where the next block receives the very tensor,
nothing is copied.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import redirect
from .errors import TestregError
from .towers import Tower
from .plan import RegisterPlan

BUFFER = "_testreg_buffer"  # on a tensor: [registers | tokens], where the tensor is its tokens


@dataclass
class Record:
    """What an active patch does with the registers; filled by the forward passes inside `Patch.recording()`.

    Attributes:
        registers: block index -> its registers after that block `(batch, registers, channels)`.
        attentions: block index -> attention `(batch, heads, registers + tokens, registers + tokens)`, for attention
            implementations that return it (`model.set_attn_implementation("eager")`).
    """

    registers: dict[int, Tensor] = field(default_factory=dict)
    attentions: dict[int, Tensor] = field(default_factory=dict)


class Relay:
    """What the modules of one patch hand on to each other.

    Attributes:
        tower: whose modules they are.
        plan: the registers.
        record: to fill, while somebody wants one.
        waiting: thread -> the block it left last, and what that gave.
        real: thread -> which tokens are not padding, from the attention to the MLP.
    """

    def __init__(self, tower: Tower, plan: RegisterPlan):
        self.tower, self.plan = tower, plan
        self.record: Record | None = None
        self.waiting: dict[int, tuple[int, Tensor]] = {}
        self.real: dict[int, Tensor] = {}


class Forward:
    """What a module does instead of its `original` forward, until `off`: whoever wrapped it meanwhile calls on."""

    def __init__(self, relay: Relay, original: Any):
        self.relay, self.original, self.off = relay, original, False
        self.registers = relay.plan.registers

    forward: Callable[..., Any]


class Block(Forward):
    def __init__(self, relay: Relay, index: int, block: nn.Module):
        super().__init__(relay, block.forward)
        self.index, self.last = index, index == len(relay.tower.blocks) - 1
        self.first = _names(block)[0]
        state = relay.plan.state
        self.start = _Placed(torch.zeros(relay.plan.registers, relay.tower.channels) if state is None else state)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.off:
            return self.original(*args, **kwargs)
        tokens, args = (args[0], args[1:]) if args else (kwargs.pop(self.first), args)  # (batch, tokens, channels)
        output = self.original(self._joined(tokens), *args, **kwargs)
        full = output[0] if isinstance(output, tuple) else output  # (batch, registers + tokens, channels)
        tokens = full[:, self.registers :]
        if self.last:
            tokens = tokens.contiguous()  # what follows the blocks may call .view
            self.relay.waiting.pop(_thread(), None)
        else:
            setattr(tokens, BUFFER, full)
            self.relay.waiting[_thread()] = (self.index, full)
        if self.relay.record is not None:
            self.relay.record.registers[self.index] = full[:, : self.registers]
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

    def _joined(self, tokens: Tensor) -> Tensor:
        if self.index == self.relay.plan.entry:
            return redirect.join(self._started(tokens), tokens)
        buffer = getattr(tokens, BUFFER, None)
        if buffer is not None:
            return buffer
        # Something between the blocks made a new tensor: a hook that steers, a move to another device.
        index, buffer = self.relay.waiting.get(_thread(), (None, None))
        if buffer is None or index != self.index - 1 or buffer.shape[0] != tokens.shape[0]:
            raise TestregError(
                f"block {self.index} was called without its registers: they join before block {self.relay.plan.entry} "
                f"and travel from block to block. Run the whole model, or remove the patch to call a block alone."
            )
        return redirect.join(buffer[:, : self.registers], tokens)

    def _started(self, tokens: Tensor) -> Tensor:
        start = self.start.like(tokens)[None]  # (1, registers, channels)
        if self.index == 0 and self.relay.plan.state is None and self.relay.tower.seed is not None:
            return self.relay.tower.seed.forward(start)  # not called as a module: nobody's hooks should count it
        return start


class Attention(Forward):
    """Masks and rotary tables grow by the registers on the way in, attention maps lose them on the way out.

    Here rather than at the block, since a block may add position biases of its own to the mask that it is given.
    """

    def __init__(self, relay: Relay, index: int, attention: nn.Module):
        super().__init__(relay, attention.forward)
        row, plan = relay.tower.row, relay.plan
        self.index, self.names = index, _names(attention)
        self.masks, self.rope, self.positions = row.masks, row.rope, row.positions
        self.growing = {*row.masks, row.rope}
        self.padded = row.padded and plan.state is None and index in plan.neurons

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.off:
            return self.original(*args, **kwargs)
        if len(args) > 1 or self.positions or not self.growing.isdisjoint(kwargs):
            args, kwargs = self._grown(*args, **kwargs)
        output = self.original(*args, **kwargs)
        if not (isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor)):
            return output
        if self.relay.record is not None:
            self.relay.record.attentions[self.index] = output[1]
        return (output[0], output[1][..., self.registers :, self.registers :], *output[2:])

    def _grown(self, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        registers, given = self.registers, {**dict(zip(self.names, args, strict=False)), **kwargs}
        first = given.pop(self.names[0])
        tokens = first.shape[1] - registers
        for name in self.masks:
            if isinstance(given.get(name), Tensor):
                given[name] = redirect.grow(given[name], registers, tokens)
        if self.rope and given.get(self.rope) is not None:
            given[self.rope] = redirect.unturned(given[self.rope], registers)
        if self.positions:
            given[self.positions] = redirect.positions(given.get(self.positions), registers, first)
        if self.padded and isinstance(given.get(self.masks[0]), Tensor):
            self.relay.real[_thread()] = redirect.real(given[self.masks[0]])
        return (first,), given


class Bias(Forward):
    """A position bias that counts the tokens without registers; the attention that calls it needs it grown."""

    def __init__(self, relay: Relay, original: Any, *, inside: bool):
        super().__init__(relay, original)
        self.inside = inside

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.off:
            return self.original(*args, **kwargs)
        if kwargs.get("dim_size") is not None:
            kwargs = {**kwargs, "dim_size": kwargs["dim_size"] - self.registers}
        bias = self.original(*args, **kwargs)  # (1, heads, tokens, tokens)
        return redirect.grow(bias, self.registers, bias.shape[-1]) if self.inside else bias


class Neurons:
    """Pre-hook of the MLP's second linear."""

    def __init__(self, relay: Relay, index: int, registers: int, down: nn.Module):
        plan, device = relay.plan, _device(down)
        self.relay, self.registers, self.fill = relay, registers, plan.state is None
        neurons = plan.neurons[index]
        self.neurons = _Placed(torch.tensor(neurons, device=device))
        self.rest = _Placed(torch.tensor(plan.rest[index] if plan.rest else [0.0] * len(neurons), device=device))

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        neurons, rest = self.neurons.on(args[0].device), self.rest.like(args[0])
        real = self.relay.real.pop(_thread(), None) if self.relay.real else None
        return (redirect.move(args[0], neurons, self.registers, rest, fill=self.fill, real=real), *args[1:])


class _Placed:
    """A constant that follows the model to its device and dtype, so that no forward pass copies it from the host."""

    def __init__(self, value: Tensor):
        self.value = self.placed = value

    def on(self, device: torch.device) -> Tensor:
        return self._place(device, self.value.dtype)

    def like(self, other: Tensor) -> Tensor:
        return self._place(other.device, other.dtype)

    def _place(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        placed = self.placed
        if placed.device == device and placed.dtype == dtype:
            return placed
        placed = self.value.to(device, dtype)
        if not torch.compiler.is_compiling():  # a tensor made while tracing belongs to the trace
            self.placed = placed
        return placed


def _names(module: nn.Module) -> list[str]:
    """The arguments of its class's `forward`: the instance's own may be somebody's wrapper, which hides them."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _device(module: nn.Module) -> torch.device:
    weight = getattr(module, "weight", None)
    return weight.device if isinstance(weight, Tensor) and weight.device.type != "meta" else torch.device("cpu")


def _thread() -> int:
    # A tracer cannot follow the thread's number and needs none: what it stores it takes away before the pass ends.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
