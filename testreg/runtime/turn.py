"""Rotary positions that an attention makes itself, by a callable of its own: the registers in front pass unturned."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import redirect
from .forwards import Forward
from .relay import Relay


class Turn(Forward):
    """A module that turns queries and keys, whose registers in front pass unturned; several attentions may share it."""

    def forward(self, *values: Tensor, **kwargs: Any) -> Any:
        here = self.relay.here
        if self.off or (here.block is None and self.relay.plan.form != "attention"):
            return self.original(*values, **kwargs)
        return redirect.beside(self.original, here.registers, *values, **kwargs)


class TurnCall:
    """The same of a callable that is no module: it stands in the attention's attributes, in place of that."""

    def __init__(self, relay: Relay, attention: nn.Module, name: str):
        self.relay, self.attention, self.name = relay, attention, name
        self.original = getattr(attention, name)
        setattr(attention, name, self)

    def __call__(self, *values: Tensor, **kwargs: Any) -> Any:
        here = self.relay.here
        if here.block is None and self.relay.plan.form != "attention":
            return self.original(*values, **kwargs)
        return redirect.beside(self.original, here.registers, *values, **kwargs)

    def take_off(self) -> None:
        """Give the attention its own callable back."""
        if getattr(self.attention, self.name) is self:
            setattr(self.attention, self.name, self.original)
