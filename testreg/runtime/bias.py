"""What a position bias does while registers are on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import redirect
from .forwards import Forward
from .relay import Relay


class Bias(Forward):
    """A position bias that counts the tokens without registers; the attention that calls it needs it grown."""

    def __init__(self, relay: Relay, index: int, module: nn.Module, *, inside: bool = False, shared: bool = False):
        super().__init__(relay, index, module)
        self.inside, self.shared = inside, shared
        self.carried = relay.plan.form != "attention" and not shared  # it is told of tokens with registers among them

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.off:
            return self.original(*args, **kwargs)
        registers, length = self.relay.here.registers, kwargs.get("dim_size")
        if self.carried and length is not None:
            registers = self.relay.registers_in(self.index, length) or 0
        if length is not None:
            kwargs = {**kwargs, "dim_size": kwargs["dim_size"] - registers}
        bias: Tensor = self.original(*args, **kwargs)  # (1, heads, tokens, tokens)
        if not self.inside:
            here = self.relay.here
            here.bias = bias if self.shared or here.shared is None else bias + here.shared
            here.shared = bias if self.shared else here.shared
            return bias
        return redirect.grow(bias, registers, bias.shape[-1])
