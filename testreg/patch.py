"""The hook installer: registers that travel beside the sequence.

Each block is called with `[registers | tokens]` and hands back only its tokens, so that nothing outside the blocks
ever counts a token more. The buffer that still holds the registers rides on the tensor that was handed back (a plain
attribute of it), so the state belongs to the call, not to the model: threads can share a model, a block recomputed
under gradient checkpointing finds what it saw the first time, and where the next block receives the very tensor,
nothing is copied.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import redirect
from .errors import BadPlan, TestregError
from .families import Tower, find_tower, reach
from .guard import Guard
from .plan import RegisterPlan

PATCHES = "_testreg_patches"  # on the tower, so that a deepcopy of the model owns copies of its patches
BUFFER = "_testreg_buffer"  # on a tensor: [registers | tokens], where the tensor is its tokens


def patch(model: nn.Module, found: RegisterPlan) -> Patch:
    """Give `model` the registers of `found`, in place, until the patch is removed.

    Args:
        model: a Vision Transformer, or a model that holds one; training mode, device and dtype may change afterwards.
        found: the plan to apply.

    Returns:
        The patch: a context manager with `.remove()`, which restores every output bit for bit. Of several patches on
        one model the last one acts; removing it brings back the one before, so patching twice never doubles.

    Raises:
        UnsupportedModel: no family describes the model.
        BadPlan: the plan does not fit the model.
    """
    return Patch(model, found)


def active(model: nn.Module) -> Patch | None:
    """The patch that acts on `model` now, if any."""
    patches = getattr(find_tower(model).module, PATCHES, [])
    return patches[-1] if patches else None


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


class Patch:
    """Registers on a model; see `patch`. It adds no parameter and no buffer."""

    def __init__(self, model: nn.Module, plan: RegisterPlan):
        tower = find_tower(model)
        check(tower, plan)
        self.tower, self.plan = tower, plan
        self._guard = Guard(model if isinstance(model, nn.Module) else model.model)  # the latter in a pipeline
        self.record: Record | None = None
        self.waiting: dict[int, tuple[int, Tensor]] = {}  # thread -> the block it left last, and what that gave
        self.real: dict[int, Tensor] = {}  # thread -> which tokens are not padding, from the attention to the MLP
        self._undo: list[Any] = []
        self._stack().append(self)
        self._show_top()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the patch off. A second call does nothing."""
        if self in self._stack():
            self._uninstall()
            self._stack().remove(self)
            self._show_top()

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """Keep the registers' own states and the full attention maps of the forward passes inside the `with`."""
        self.record = Record()
        try:
            yield self.record
        finally:
            self.record = None

    def _stack(self) -> list[Patch]:
        patches = self.tower.module.__dict__.setdefault(PATCHES, [])
        return patches

    def _show_top(self) -> None:
        patches = self._stack()
        for other in patches[:-1]:
            other._uninstall()
        if patches and not patches[-1]._undo:
            patches[-1]._install()
        if not patches:
            del self.tower.module.__dict__[PATCHES]

    def _install(self) -> None:
        tower, plan = self.tower, self.plan
        self._guard.on()
        self._undo.append(self._guard.off)
        for index, (block, down, attention) in enumerate(zip(tower.blocks, tower.downs, tower.attentions, strict=True)):
            registers = plan.registers if index >= plan.entry else 0
            if registers:
                self._replace(block, _Block(self, index, block))
                self._replace(attention, _Attention(self, index, attention))
                bias = reach(block, tower.row.bias)
                if bias is not None:
                    self._replace(bias, _Bias(self, bias.forward, inside=bias in list(attention.modules())))
            if index in plan.neurons:
                hook = _Neurons(self, index, registers, _device(down))
                self._undo.append(down.register_forward_pre_hook(hook).remove)

    def _replace(self, module: nn.Module, instead: _Forward) -> None:
        # An instance attribute is the least invasive place: no subclass, no wrapper module, no key of the state dict
        # changes. A bound method of our own object, since deepcopy then binds the copy's method to the copy.
        before = module.__dict__.get("forward")
        module.forward = instead.forward
        self._undo.append(_Restore(module, instead, before))

    def _uninstall(self) -> None:
        while self._undo:
            self._undo.pop()()


class _Forward:
    """What a module does instead of its `original` forward, until `off`: whoever wrapped it meanwhile calls on."""

    def __init__(self, owner: Patch, original: Any):
        self.patch, self.original, self.off = owner, original, False
        self.registers = owner.plan.registers

    forward: Callable[..., Any]


class _Restore:
    """Gives a module back the `forward` that it had, on the instance or from its class."""

    def __init__(self, module: nn.Module, instead: _Forward, before: Any):
        self.module, self.instead, self.before = module, instead, before

    def __call__(self) -> None:
        if self.module.__dict__.get("forward") != self.instead.forward:  # somebody wrapped it since: step aside
            self.instead.off = True
        elif self.before is None:
            del self.module.forward
        else:
            self.module.forward = self.before


class _Block(_Forward):
    def __init__(self, owner: Patch, index: int, block: nn.Module):
        super().__init__(owner, block.forward)
        self.index, self.last = index, index == len(owner.tower.blocks) - 1
        self.first = _names(block)[0]
        state = owner.plan.state
        self.start = _Placed(torch.zeros(owner.plan.registers, owner.tower.channels) if state is None else state)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.off:
            return self.original(*args, **kwargs)
        tokens, args = (args[0], args[1:]) if args else (kwargs.pop(self.first), args)  # (batch, tokens, channels)
        output = self.original(self._joined(tokens), *args, **kwargs)
        full = output[0] if isinstance(output, tuple) else output  # (batch, registers + tokens, channels)
        tokens = full[:, self.registers :]
        if self.last:
            tokens = tokens.contiguous()  # what follows the blocks may call .view
            self.patch.waiting.pop(_thread(), None)
        else:
            setattr(tokens, BUFFER, full)
            self.patch.waiting[_thread()] = (self.index, full)
        if self.patch.record is not None:
            self.patch.record.registers[self.index] = full[:, : self.registers]
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

    def _joined(self, tokens: Tensor) -> Tensor:
        if self.index == self.patch.plan.entry:
            return redirect.join(self._started(tokens), tokens)
        buffer = getattr(tokens, BUFFER, None)
        if buffer is not None:
            return buffer
        # Something between the blocks made a new tensor: a hook that steers, a move to another device.
        index, buffer = self.patch.waiting.get(_thread(), (None, None))
        if buffer is None or index != self.index - 1 or buffer.shape[0] != tokens.shape[0]:
            raise TestregError(
                f"block {self.index} was called without its registers: they join before block {self.patch.plan.entry} "
                f"and travel from block to block. Run the whole model, or remove the patch to call a block alone."
            )
        return redirect.join(buffer[:, : self.registers], tokens)

    def _started(self, tokens: Tensor) -> Tensor:
        start = self.start.like(tokens)[None]  # (1, registers, channels)
        if self.index == 0 and self.patch.plan.state is None and self.patch.tower.seed is not None:
            return self.patch.tower.seed.forward(start)  # not called as a module: nobody's hooks should count it
        return start


class _Attention(_Forward):
    """Masks and rotary tables grow by the registers on the way in, attention maps lose them on the way out.

    Here rather than at the block, since a block may add position biases of its own to the mask that it is given.
    """

    def __init__(self, owner: Patch, index: int, attention: nn.Module):
        super().__init__(owner, attention.forward)
        row, plan = owner.tower.row, owner.plan
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
        if self.patch.record is not None:
            self.patch.record.attentions[self.index] = output[1]
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
            self.patch.real[_thread()] = redirect.real(given[self.masks[0]])
        return (first,), given


class _Bias(_Forward):
    """A position bias that counts the tokens without registers; the attention that calls it needs it grown."""

    def __init__(self, owner: Patch, original: Any, *, inside: bool):
        super().__init__(owner, original)
        self.inside = inside

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.off:
            return self.original(*args, **kwargs)
        if kwargs.get("dim_size") is not None:
            kwargs = {**kwargs, "dim_size": kwargs["dim_size"] - self.registers}
        bias = self.original(*args, **kwargs)  # (1, heads, tokens, tokens)
        return redirect.grow(bias, self.registers, bias.shape[-1]) if self.inside else bias


class _Neurons:
    """Pre-hook of the MLP's second linear."""

    def __init__(self, owner: Patch, index: int, registers: int, device: torch.device):
        plan = owner.plan
        self.patch, self.registers, self.fill = owner, registers, plan.state is None
        neurons = plan.neurons[index]
        self.neurons = _Placed(torch.tensor(neurons, device=device))
        self.rest = _Placed(torch.tensor(plan.rest[index] if plan.rest else [0.0] * len(neurons), device=device))

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        neurons, rest = self.neurons.on(args[0].device), self.rest.like(args[0])
        real = self.patch.real.pop(_thread(), None) if self.patch.real else None
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


def check(tower: Tower, plan: RegisterPlan) -> None:
    """Whether `plan` fits `tower`.

    Raises:
        BadPlan: a block, neuron, entry or state is out of the tower's range.
    """

    def misfit(has: str, wants: str) -> BadPlan:
        what = f"the {tower.family} tower {type(tower.module).__name__}"
        return BadPlan(f"{wants}, but {what} has {has}: the plan was made for another model.")

    blocks = f"blocks 0 to {len(tower.blocks) - 1}"
    if plan.entry >= len(tower.blocks):
        raise misfit(blocks, f"the registers join before block {plan.entry}")
    for block, row in plan.neurons.items():
        if block >= len(tower.blocks):
            raise misfit(blocks, f"the plan names block {block}")
        if row[-1] >= tower.neurons[block]:
            raise misfit(
                f"neurons 0 to {tower.neurons[block] - 1} there", f"the plan names neuron {row[-1]} of block {block}"
            )
    if plan.state is not None and plan.state.shape[-1] != tower.channels:
        raise misfit(f"{tower.channels} channels", f"the register state has {plan.state.shape[-1]} channels")


def _names(module: nn.Module) -> list[str]:
    """The arguments of its class's `forward`: the instance's own may be somebody's wrapper, which hides them."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _device(module: nn.Module) -> torch.device:
    weight = getattr(module, "weight", None)
    return weight.device if isinstance(weight, Tensor) and weight.device.type != "meta" else torch.device("cpu")


def _thread() -> int:
    # A tracer cannot follow the thread's number and needs none: what it stores it takes away before the pass ends.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
