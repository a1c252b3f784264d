"""The hook installer: registers put on a model, and taken off without a trace."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import nn

from .bias import Bias
from .carrier import Carrier
from .decoders import found_again, tower_of
from .errors import AnotherModel, TestregError
from .fingerprint import check_base, fits
from .fitting import check
from .forwards import ATTENTION, NEURONS, Attention, Block, Forward, Neurons, PackedRows, Rows
from .guard import PATCHES, Guard, acting
from .paths import path_to, reach, walk
from .plan import RegisterPlan
from .prefix import Prefixed, measure, shifted
from .relay import Record, Relay
from .seal import Seal
from .towers import Tower, blocks_of
from .turn import Turn, TurnCall


def patch(model: nn.Module, found: RegisterPlan | str | PathLike[str]) -> Patch:
    """Give `model` the registers of `found`, in place, until the patch is removed.

    Args:
        model: a Vision Transformer or a causal language model, whichever the plan is for, or a model that holds one;
            training mode, device and dtype may change afterwards.
        found: the plan to apply, the path of its file, or a name on the hub, `"owner/name"`.

    Returns:
        The patch: a context manager with `.remove()`, which restores every output bit for bit. Of several patches on
        one model the last one acts; removing it brings back the one before, so patching twice never doubles.

    Raises:
        UnsupportedModel: no family describes the model.
        BadPlan: the plan does not fit the model, is none, or comes from the hub and was found on other weights.

    Warns:
        AnotherModel: the plan was found on other weights.
    """
    whole = model if isinstance(model, nn.Module) else getattr(model, "model", model)  # the latter in a pipeline
    plan = RegisterPlan.of(found, whole)
    hub = plan.provenance.get("hub") if plan is found else None  # loaded here, it was checked already
    if isinstance(hub, dict) and not hub.get("force"):  # a stranger's plan may fit the shapes, and no more
        check_base(plan, whole)
    return Patch(model, plan)


def active(model: nn.Module) -> Patch | None:
    """The patch that acts on `model` now, if any.

    It is kept true: before every pass, and here, modules that were exchanged under the patch (a quantiser, an adapter
    that was merged, a forward that was restored) are noticed, and the patch is put on the new ones; during the pass a
    block notices whether its attention and its second linear acted.

    Raises:
        TestregError: the model was changed so far that the patch cannot follow; the message says what to do.
    """
    found: Patch | None = acting(model)
    if found is not None:
        found.follow()
    return found


class Patch:
    """Registers on a model; see `patch`. It adds no parameter and no buffer."""

    def __init__(self, model: nn.Module, plan: RegisterPlan):
        tower = tower_of(model, plan)
        check(tower, plan)
        if not fits(plan, tower):
            warnings.warn(
                f"the plan was found on other weights than those of this {type(model).__name__} "
                f"({plan.provenance['base'].get('model') or 'another model'}): its registers may do harm. Find the "
                f"model's own with testreg.find(model, images).",
                AnotherModel,
                stacklevel=3,
            )
        self.plan = plan
        self._guard = Guard(model if isinstance(model, nn.Module) else model.model)  # the latter in a pipeline
        self._relay = Relay(tower, plan)
        self._worn: list[Forward] = []
        self._turns: list[TurnCall] = []
        self._hooks: list[Any] = []
        self._seal = Seal()
        self._stack().append(self)
        self._show_top()

    @property
    def tower(self) -> Tower:
        """What the registers are in."""
        return self._relay.tower

    @property
    def inside(self) -> Any:
        """How many registers are in front of the tokens where this thread is now, inside a block or its attention."""
        here = self._relay.here
        return here.registers if here.block is not None or self.plan.form == "attention" else 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        """That of a copied tower; with a part of one goes nothing."""
        copied = memo[id(self)] = Patch.__new__(Patch)
        whole = id(self.tower.module) in memo
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo) if whole else {"_hooks": [], "_relay": None})
        return copied

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
        self._relay.record = record = Record()
        try:
            yield record
        finally:
            self._relay.record = None

    def follow(self) -> None:
        """Put the patch on modules that came in the place of those that it was put on.

        Raises:
            TestregError: the model was changed so far that the plan does not fit it.
        """
        if not self._hooks or self._seal.holds():
            return
        tower = self.tower
        blocks = blocks_of(tower.module, tower.row)
        if blocks == tower.blocks and all(self._still(worn, blocks) for worn in self._worn):
            if self._seal.possible:
                self._seal = Seal(tower.module, [worn.module for worn in self._worn], blocks)
            return
        self._uninstall()
        try:
            self._relay.tower = found_again(tower)
            pruned = len(blocks) < len(tower.blocks) and blocks == tower.blocks[: len(blocks)]
            if not pruned:  # the first blocks alone need nothing that the others had
                check(self.tower, self.plan)
        except TestregError as error:
            raise TestregError(
                f"{type(tower.module).__name__} was changed under its patch, which does not fit any more: {error} "
                f"Take the patch off, testreg.active(model).remove(), and find registers for the model as it is."
            ) from error
        self._install()

    def _still(self, worn: Forward, blocks: tuple[nn.Module, ...]) -> bool:
        """Whether a module is where it was, and nobody gave it back the forward that it had."""
        now = worn.module.__dict__.get("forward")
        ours = _owner(now) is worn
        if not ours and (now is None or now == worn.before or _own(now, worn.module)):
            return False
        if worn.path is None:
            return True
        return worn.index < len(blocks) and walk(blocks[worn.index], worn.path) is worn.module

    def _stack(self) -> list[Patch]:
        patches = self.tower.module.__dict__.setdefault(PATCHES, [])
        return patches

    def _show_top(self) -> None:
        patches = self._stack()
        for other in patches[:-1]:
            other._uninstall()
        if patches and not patches[-1]._hooks:
            patches[-1]._install()
        if not patches:
            del self.tower.module.__dict__[PATCHES]

    def _install(self) -> None:
        tower, plan, relay = self.tower, self.plan, self._relay
        self._guard.on()
        self._clear()
        # Hooks survive whoever restores forwards, and forwards, unlike hooks, are what compilers guard.
        for module in (tower.module, tower.blocks[0]):
            self._hooks.append(module.register_forward_pre_hook(self._before))
        self._hooks.append(tower.module.register_forward_hook(self._after))
        carries = plan.registers > 0 and plan.form != "attention"
        for index, (block, down, attention) in enumerate(zip(tower.blocks, tower.downs, tower.attentions, strict=True)):
            acts = NEURONS if index in plan.neurons else 0
            if plan.registers and index >= plan.entry:
                acts |= ATTENTION
                in_block = path_to(block, tower.row.attention)
                rows = Prefixed if plan.language else PackedRows if tower.row.segments else Rows
                self._wear((Attention if carries else rows)(relay, index, attention), in_block)
                self._wear_turn(index, attention)
                bias = reach(block, tower.row.bias)
                if bias is not None:
                    self._wear(Bias(relay, index, bias, inside=bias in list(attention.modules())))
            if index in plan.neurons:
                self._wear(Neurons(relay, index, down), path_to(block, tower.row.down))
            if acts:
                carrier = carries and index >= plan.entry
                self._wear((Carrier if carrier else Block)(relay, index, block, acts), ())
        shared = reach(tower.module, tower.row.shared_bias)
        if shared is not None and plan.registers:
            self._wear(Bias(relay, 0, shared, shared=True))
        if plan.language and plan.registers:
            for table in shifted(relay):
                self._wear(table)
            measure(tower, relay)

    def _clear(self) -> None:
        """Take off what came with parts that were copied out of a patched model."""
        module = self.tower.module
        within = {id(part) for part in module.modules()} - {id(module)}  # another tower in this one keeps its own

        def foreign(relay: Relay | None) -> bool:
            return relay is None or id(relay.tower.module) not in within

        for part in module.modules():
            while isinstance(worn := _owner(part.__dict__.get("forward")), Forward) and foreign(worn.relay):
                part.__dict__.pop("forward") if worn.before is None else part.__dict__.update(forward=worn.before)
            for hooks in (part._forward_pre_hooks, part._forward_hooks):
                for key in [key for key, hook in hooks.items() if isinstance(_owner(hook), Patch)]:
                    if foreign(_owner(hooks[key])._relay):
                        del hooks[key]

    def _wear_turn(self, index: int, attention: nn.Module) -> None:
        name = self.tower.row.turn
        turn = getattr(attention, name, None) if name else None
        if isinstance(turn, nn.Module):
            if not any(worn.module is turn for worn in self._worn):
                self._wear(Turn(self._relay, index, turn))
        elif turn is not None and name is not None:
            self._turns.append(TurnCall(self._relay, attention, name))

    def _wear(self, instead: Forward, path: tuple[str, ...] | None = None) -> None:
        # An instance attribute is the least invasive place: no subclass, no wrapper module, no key of the state dict
        # changes. A bound method of our own object, since deepcopy then binds the copy's method to the copy.
        instead.module.forward = instead.forward
        instead.path = path
        self._worn.append(instead)

    def _uninstall(self) -> None:
        self._seal = Seal()
        while self._hooks:
            self._hooks.pop().remove()
        for put in (self._worn, self._turns):
            while put:
                put.pop().take_off()
        self._guard.off()

    def _before(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not self._hooks:
            return  # a compiler guards what it read, and reads it anew when that is exchanged
        here, whole = self._relay.here, module is self.tower.module
        if whole:
            here.passed = False
        if whole or not here.followed:  # blocks may be run without their tower
            self.follow()
        here.followed = whole

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if not (torch.compiler.is_compiling() or self._hooks):
            return
        here = self._relay.here
        here.waiting = here.bias = here.shared = None
        here.followed = False
        if torch.compiler.is_compiling() or here.passed or output is None or not self._worn:
            return
        raise TestregError(
            f"{type(module).__name__} ran without calling its blocks as modules, so the registers could not act: "
            f"it unpacks them, or was compiled before they were put on. Patch before compiling."
        )


def _owner(method: Any) -> Any:
    return getattr(method, "__self__", None)


def _own(forward: Any, module: nn.Module) -> bool:
    """Whether it is the forward of the module's class, set on the instance by somebody who kept it."""
    return getattr(forward, "__func__", None) is type(module).forward
