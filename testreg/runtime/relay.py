"""What the modules of one patch share: the plan, where a thread's pass is, and the registers as they begin."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import redirect
from .errors import RegistersStretched
from .plan import RegisterPlan
from .towers import Tower


@dataclass
class Record:
    """What an active patch does with the registers; filled by the forward passes inside `Patch.recording()`.

    Attributes:
        registers: block index -> its registers after that block `(batch, registers, channels)`; in the attention form
            what the block's attention gives for their rows.
        attentions: block index -> attention `(batch, heads, registers + tokens, registers + tokens)`, for attention
            implementations that return it (`model.set_attn_implementation("eager")`).
    """

    registers: dict[int, Tensor] = field(default_factory=dict)
    attentions: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Here:
    """Where a thread's pass is.

    Attributes:
        block: the block that runs, None between blocks.
        registers: how many are in front of the tokens inside it.
        passed: whether a block ran in this pass.
        followed: whether its tower looked for exchanged modules before this pass.
        acted: which of ATTENTION and NEURONS did so in it.
        real: which tokens are not padding, from the attention to the MLP.
        shared: the position bias of all blocks.
        bias: all position biases that are in the mask which attention gets.
        waiting: the block that was left last, its registers without their graph, and how to get them with it.
    """

    block: int | None = None
    registers: int = 0
    passed: bool = False
    followed: bool = False
    acted: int = 0
    real: Tensor | None = None
    shared: Tensor | None = None
    bias: Tensor | None = None
    waiting: tuple[int, Tensor, Callable[[], Tensor | None]] | None = None


class Relay:
    """What the modules of one patch share.

    Attributes:
        tower: whose modules they are.
        plan: the registers.
        record: to fill, while somebody wants one.
        measuring: a language model's attentions show what they make of the registers.
    """

    def __init__(self, tower: Tower, plan: RegisterPlan):
        self.tower, self.plan = tower, plan
        self.record: Record | None = None
        self.told = self.measuring = False
        self._counted = -1, 0  # tokens of the last call, and how many registers went with them
        self._local = threading.local()
        self._local.here = Here()  # there before the first pass, which may be a compiled one

    @property
    def here(self) -> Here:
        """Where this thread's pass is."""
        # An attribute of a thread-local, not a class of such: dynamo forgets what is written into the latter.
        here: Here | None = getattr(self._local, "here", None)
        if here is None:
            here = self._local.here = Here()
        return here

    def count(self, tokens: Any) -> Any:
        """How many registers go with so many tokens, prefix tokens among them."""
        plan = self.plan
        if plan.law is None or self.tower.row.packed:  # packed, they are shared by images of any number of patches
            return plan.registers
        if type(tokens) is not int or torch.compiler.is_compiling():  # what is kept here would be part of a trace
            return self._count(tokens)
        known, count = self._counted
        if tokens != known:
            count = self._count(tokens)
            self._counted = tokens, count
        return count

    def _count(self, tokens: Any) -> Any:
        law, patches = self.plan.law, tokens - self.tower.prefix
        assert law is not None
        if type(patches) is int and not self.told and not law.reaches(patches):
            self.told = True
            warnings.warn(
                f"an image of {patches} patches is more than twice beyond the sizes that its registers were counted at "
                f"({law.fewest} to {law.most} patches), so that {law(patches)} registers are a guess: "
                f"testreg.find(model, images, sizes=...) measures other sizes.",
                RegistersStretched,
                stacklevel=3,
            )
        return law(patches)

    def registers_in(self, index: int, length: Any) -> Any:
        """How many of `length` registers and tokens in a block are registers; None where it is open.

        The block's mark says it. Where a backward pass computes the inside of a block again, without its forward, the
        length does: it only grows with the number of patches.
        """
        if self.here.block == index:
            return self.here.registers
        if torch._C._current_graph_task_id() < 0:
            return None
        prefix = self.tower.prefix
        registers: int = max(self.plan.registers_for(1), self.plan.registers_for(length))
        while registers and registers > self.plan.registers_for(max(1, length - registers - prefix)):
            registers -= 1
        return registers

    def __getstate__(self) -> dict[str, Any]:  # no pass goes on in a copy
        return {**self.__dict__, "_local": None, "record": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()


class Start:
    """The registers as they begin, as many as are asked for.

    Args:
        block: in the attention form, for which block from the entry on.
    """

    def __init__(self, relay: Relay, block: int | None = None):
        plan, tower = relay.plan, relay.tower
        if plan.state is None:
            state = torch.zeros(plan.registers, tower.channels)
            self.seed = tower.seed if plan.entry == 0 else None
        else:
            state, self.seed = plan.state if block is None else plan.state[block], None
        alike = bool((state == state[:1]).all())
        self.dealt = plan.law is not None and not alike
        self.state = Placed((state[:1] if alike and plan.law is not None else state)[None])

    def like(self, tokens: Tensor, count: Any) -> Tensor:
        """Registers `(batch, count, channels)` for `tokens` `(batch, tokens, channels)`, in their device and dtype."""
        rows = self.state.like(tokens)  # (1, registers or 1, channels)
        if self.dealt and (
            torch.compiler.is_compiling() or count != rows.shape[1]
        ):  # a compiler would guard the latter
            rows = redirect.dealt(rows[0], count)[None]  # (1, count, channels)
        if self.seed is not None:  # as no module: nobody's hooks should count it
            rows = self.seed.forward(rows.expand(-1, count, -1))
        return rows.expand(tokens.shape[0], count, -1)


class Placed:
    """A constant that follows the model to its device and dtype, so that no forward pass copies it from the host."""

    def __init__(self, value: Tensor):
        self.value = self.placed = value

    def on(self, device: torch.device) -> Tensor:
        placed = self.placed  # read once: another thread may place it elsewhere
        return placed if placed.device == device else self._place(device, self.value.dtype)

    def like(self, other: Tensor) -> Tensor:
        placed = self.placed
        if placed.dtype == other.dtype and placed.device == other.device:
            return placed
        return self._place(other.device, other.dtype)

    def _place(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        if torch.compiler.is_compiling():  # a tensor made while tracing belongs to the trace
            return self.value.to(device, dtype)
        with torch.inference_mode(False):  # one made in inference mode could be no part of a training step
            self.placed = placed = self.value.to(device, dtype)
        return placed
