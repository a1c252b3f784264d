"""The hook installer: registers that travel beside the sequence, put on a model and taken off without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .errors import BadPlan
from .families import Tower, find_tower, reach
from .fingerprint import check_base
from .forwards import Attention, Bias, Block, Forward, Neurons, Record, Relay
from .guard import Guard
from .plan import RegisterPlan

PATCHES = "_testreg_patches"  # on the tower, so that a deepcopy of the model owns copies of its patches


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
        BadPlan: the plan does not fit the model, or comes from the hub and was found on other weights.
    """
    hub = found.provenance.get("hub")
    if isinstance(hub, dict) and not hub.get("force"):  # a stranger's plan may fit the shapes, and no more
        check_base(found, model if isinstance(model, nn.Module) else model.model)
    return Patch(model, found)


def active(model: nn.Module) -> Patch | None:
    """The patch that acts on `model` now, if any."""
    patches = getattr(find_tower(model).module, PATCHES, [])
    return patches[-1] if patches else None


class Patch:
    """Registers on a model; see `patch`. It adds no parameter and no buffer."""

    def __init__(self, model: nn.Module, plan: RegisterPlan):
        tower = find_tower(model)
        check(tower, plan)
        self.tower, self.plan = tower, plan
        self._guard = Guard(model if isinstance(model, nn.Module) else model.model)  # the latter in a pipeline
        self._relay = Relay(tower, plan)
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
        self._relay.record = record = Record()
        try:
            yield record
        finally:
            self._relay.record = None

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
                self._replace(block, Block(self._relay, index, block))
                self._replace(attention, Attention(self._relay, index, attention))
                bias = reach(block, tower.row.bias)
                if bias is not None:
                    self._replace(bias, Bias(self._relay, bias.forward, inside=bias in list(attention.modules())))
            if index in plan.neurons:
                hook = Neurons(self._relay, index, registers, down)
                self._undo.append(down.register_forward_pre_hook(hook).remove)

    def _replace(self, module: nn.Module, instead: Forward) -> None:
        # An instance attribute is the least invasive place: no subclass, no wrapper module, no key of the state dict
        # changes. A bound method of our own object, since deepcopy then binds the copy's method to the copy.
        before = module.__dict__.get("forward")
        module.forward = instead.forward
        self._undo.append(_Restore(module, instead, before))

    def _uninstall(self) -> None:
        while self._undo:
            self._undo.pop()()


class _Restore:
    """Gives a module back the `forward` that it had, on the instance or from its class."""

    def __init__(self, module: nn.Module, instead: Forward, before: Any):
        self.module, self.instead, self.before = module, instead, before

    def __call__(self) -> None:
        if self.module.__dict__.get("forward") != self.instead.forward:  # somebody wrapped it since: step aside
            self.instead.off = True
        elif self.before is None:
            del self.module.forward
        else:
            self.module.forward = self.before


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
