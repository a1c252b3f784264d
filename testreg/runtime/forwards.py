"""What blocks, attentions and second linears do while registers are on.

Two ways, by the plan's form. *Attention*: each attention gets constant rows in front of its tokens and gives back the
tokens' alone; nothing else sees them. *Tokens* (constant and dynamic): registers travel from block to block, as
`carrier` says, and attention's other arguments grow by them.

A block marks its pass: what acts inside knows that it is there, and the block knows afterwards that it acted.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import packed, redirect
from .errors import TestregError, UnsupportedModel
from .relay import Placed, Relay, Start

ATTENTION, NEURONS = 1, 2  # what acts inside a block
LONGEST = "max_seqlen"  # transformers' name of the longest segment
SQUARE = "attn_mask"  # torch's own name of a mask, whose two dimensions are queries and keys


class Forward:
    """What a module does instead of its own forward, until `off`: whoever wrapped it meanwhile calls on.

    Attributes:
        before: the forward that the module had on the instance, None where its class's was used.
        path: where in its block the module is, in parts; None where that does not matter.
    """

    path: tuple[str, ...] | None = None

    def __init__(self, relay: Relay, index: int, module: nn.Module):
        self.relay, self.index, self.module, self.off = relay, index, module, False
        self.before = module.__dict__.get("forward")
        self.names = names(module)
        self._bind()

    forward: Callable[..., Any]

    def _bind(self) -> None:
        self.original = self.before or MethodType(type(self.module).forward, self.module)

    def take_off(self) -> None:
        """Give the module back the forward that it had, on the instance or from its class."""
        if self.module.__dict__.get("forward") != self.forward:  # somebody wrapped it since: step aside
            self.off = True
        elif self.before is None:
            del self.module.forward
        else:
            self.module.forward = self.before

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        """Of a whole tower, the copy's own; of a part of one, a forward that the part alone would have."""
        if id(self.relay.tower.module) in memo:
            state = copy.deepcopy(self.__getstate__(), memo)
        else:
            part = {"module": self.module, "before": self.before, "relay": None}
            state = {**copy.deepcopy(part, memo), "off": True}
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(state)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "original"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind()  # a pickled method would be looked up on the module, and found to be this object's


class Block(Forward):
    """Marks the pass of a block whose tokens are all its own.

    Args:
        acts: what has to act inside.
    """

    def __init__(self, relay: Relay, index: int, module: nn.Module, acts: int):
        super().__init__(relay, index, module)
        self.acts = acts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.off:
            return self.original(*args, **kwargs)
        here = self.relay.here
        here.acted, here.passed = 0, True
        output = self.original(*args, **kwargs)
        if here.acted & self.acts != self.acts:
            raise self._missed(here.acted)
        return output

    def _missed(self, acted: int) -> TestregError:
        missing = "second linear" if acted & ATTENTION or not self.acts & ATTENTION else "attention"
        return TestregError(
            f"block {self.index} ({type(self.module).__name__}) ran without calling its {missing} as a module, so the "
            f"registers could not act: a fused kernel reads its weights, or it was exchanged while a compiled model "
            f"ran. Switch the fusion off, or patch again: testreg.active(model).remove(), testreg.patch(...)."
        )


class Attention(Forward):
    """Masks and rotary tables grow by the registers in front on the way in, attention maps lose them on the way out.

    Here rather than at the block, since a block may add position biases of its own to the mask that it is given.
    """

    def __init__(self, relay: Relay, index: int, module: nn.Module):
        super().__init__(relay, index, module)
        row, plan = relay.tower.row, relay.plan
        self.masks, self.rope, self.segments = row.masks, row.rope, row.segments
        self.positions = row.positions if row.positions in self.names else None
        self.growing = tuple(name for name in (*row.masks, row.rope) if name)
        self.padded = plan.form == "dynamic" and index in plan.neurons
        self.inverted = isinstance(module, nn.MultiheadAttention)  # its masks of booleans say who may not attend

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.off:
            return self.original(*args, **kwargs)
        if self.segments and kwargs.get(self.segments) is not None:
            raise TestregError(
                f"block {self.index} was given images packed into one sequence ({self.segments}), in which a token "
                f"would belong to all of them: give images of one size, or take registers that only attention sees "
                f"(form='attention')."
            )
        first = args[0] if args else kwargs[self.names[0]]  # (batch, registers + tokens, channels)
        registers = self.relay.registers_in(self.index, self.relay.tower.turned(first).shape[1])
        self.relay.here.acted |= ATTENTION
        return self._grown(registers or 0, args, kwargs)

    def _grown(self, registers: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original's output for tokens that have registers in front, which its other arguments do not know of."""
        others = (*args[1:], *map(kwargs.get, self.growing))
        if self.positions or any(value is not None for value in others):
            args, kwargs = self._told(registers, *args, **kwargs)
        output = self.original(*args, **kwargs)
        if not (isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor)):
            return output
        if self.relay.record is not None:
            self.relay.record.attentions[self.index] = output[1]
        return (output[0], output[1][..., registers:, registers:], *output[2:])

    def _told(self, registers: Any, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        first = given.pop(self.names[0])
        tokens = self.relay.tower.turned(first).shape[1] - registers
        for name in self.masks:
            mask = given.get(name)
            if isinstance(mask, Tensor):
                if self.inverted and mask.dtype == torch.bool:
                    mask = redirect.additive(~mask, first.dtype)
                given[name] = redirect.grow(mask, registers, tokens, square=name == SQUARE, bias=self.relay.here.bias)
            elif mask is not None:
                given[name] = redirect.grow_blocks(mask, registers, tokens)
        if self.rope and given.get(self.rope) is not None:
            given[self.rope] = redirect.unturned(given[self.rope], registers)
        if self.positions:
            given[self.positions] = redirect.positions(given.get(self.positions), registers, first)
        if self.padded and self.masks and given.get(self.masks[0]) is not None:
            self.relay.here.real = redirect.real(given[self.masks[0]], square=self.masks[0] == SQUARE)
        return (first,), given


class Rows(Attention):
    """An attention that gets constant rows in front of its tokens, and gives back the tokens' rows alone."""

    def __init__(self, relay: Relay, index: int, module: nn.Module):
        super().__init__(relay, index, module)
        self.start = Start(relay, index - relay.plan.entry)
        self.shared = relay.tower.row.packed and not relay.tower.row.segments
        self.axis = 0 if relay.tower.sequence_first else 1  # of the tokens

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.off:
            return self.original(*args, **kwargs)
        here, tower, axis = self.relay.here, self.relay.tower, self.axis
        here.acted |= ATTENTION
        first = args[0] if args else kwargs[self.names[0]]  # (batch, tokens, channels)
        by_lengths = self.shared and kwargs.get("cu_seq_lens_q") is not None
        if by_lengths or first.ndim != 3:
            self._refuse(first, by_lengths)
        registers = self.relay.count(first.shape[axis])
        rows = tower.turned(self.start.like(tower.turned(first), registers))
        joined = torch.cat([rows, first], axis)  # (batch, registers + tokens, channels)
        # Where queries, keys and values come one by one, they are the same tensor, as attention to oneself has it.
        args = tuple([joined if value is first else value for value in args])
        kwargs = {name: joined if value is first else value for name, value in kwargs.items()}
        here.registers = registers  # for a position bias that is made inside
        try:
            output = self._grown(registers, args, kwargs)
        finally:
            here.registers = 0
        full, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        if self.relay.record is not None:
            self.relay.record.registers[self.index] = tower.turned(full)[:, :registers]
        left = full[:, registers:] if axis else full[registers:]  # (batch, tokens, channels)
        return left if rest is None else (left, *rest)

    def _refuse(self, first: Tensor, by_lengths: bool) -> NoReturn:
        if by_lengths:
            raise UnsupportedModel(
                f"flash attention parts the images of {type(self.relay.tower.module).__name__} by their lengths, so no "
                f"row can be shared by them: model.set_attn_implementation('sdpa')."
            )
        raise UnsupportedModel(
            f"the attention of block {self.index} ({type(self.module).__name__}) is given {first.ndim} dimensions, "
            f"not (batch, tokens, channels), so that no row can be put in front of its tokens: take another form."
        )


class PackedRows(Rows):
    """An attention over the tokens of all images in one sequence: each image's segment gets the rows in front."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name = self.segments or ""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        segments = given.get(name)
        if self.off or segments is None:
            return super().forward(*args, **kwargs)
        self.relay.here.acted |= ATTENTION
        tokens = given.pop(self.names[0])  # (tokens, channels) or (1, tokens, channels)
        law = self.relay.plan.law
        counts = None if law is None else [law(length) for length in segments.diff().tolist()]
        rows = self.start.like(tokens, self.relay.plan.registers)[0]  # (registers, channels)
        at = packed.places(segments, tokens.shape[-2], len(rows), counts)
        given[name] = at.segments
        if given.get(LONGEST) is not None:
            given[LONGEST] = packed.longest(given[LONGEST], at)
        if self.rope and given.get(self.rope) is not None:
            given[self.rope] = packed.unturned(given[self.rope], at)
        output = self.original(packed.join(rows, tokens, at), **given)
        if not isinstance(output, tuple):
            return packed.leave(output, at)
        maps = [
            packed.leave(packed.leave(part, at).mT, at).mT if isinstance(part, Tensor) else part for part in output[1:]
        ]
        return (packed.leave(output[0], at), *maps)


class Neurons(Forward):
    """A second linear whose register neurons rest: on all tokens, or on all but the registers among them."""

    def __init__(self, relay: Relay, index: int, module: nn.Module):
        super().__init__(relay, index, module)
        plan, device = relay.plan, _device(module)
        neurons = plan.neurons[index]
        self.carried = plan.form != "attention" and plan.registers > 0 and index >= plan.entry
        self.fill = plan.form == "dynamic"
        self.neurons = Placed(torch.tensor(neurons, device=device))
        self.rest = Placed(torch.tensor(plan.rest[index] if plan.rest else [0.0] * len(neurons), device=device))

    def forward(self, activation: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.off:
            return self.original(activation, *args, **kwargs)
        here = self.relay.here
        here.acted |= NEURONS
        neurons, rest = self.neurons.on(activation.device), self.rest.like(activation)
        if not self.carried:
            return self.original(redirect.rest(activation, neurons, rest), *args, **kwargs)
        registers = self.relay.registers_in(self.index, self.relay.tower.turned(activation).shape[1])
        if registers is None:
            raise TestregError(
                f"the second linear of block {self.index} was called without its block, so which of its tokens are "
                f"registers cannot be told: the block's forward was restored or passed by, or a traced copy of the "
                f"model shares this module. Patch the model again, or trace it while it is patched; registers that "
                f"only attention sees (form='attention') need no block."
            )
        turned = self.relay.tower.turned
        moved = redirect.move(turned(activation), neurons, registers, rest, fill=self.fill, real=here.real)
        return self.original(turned(moved), *args, **kwargs)


def names(module: nn.Module) -> list[str]:
    """The arguments of its class's `forward`: the instance's own may be somebody's wrapper, which hides them."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _device(module: nn.Module) -> torch.device:
    weight = getattr(module, "weight", None)
    return weight.device if isinstance(weight, Tensor) and weight.device.type != "meta" else torch.device("cpu")
