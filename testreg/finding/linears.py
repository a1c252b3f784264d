"""Who multiplies by which weight: every linear of a model met at the moment of its product, whatever called it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# What a linear calls, and where its input and its weight lie among the arguments.
OPERANDS: dict[Any, tuple[tuple[str, ...], tuple[str, ...]]] = {
    functional.linear: (("input", "weight", "bias"), ("input", "weight")),
    torch.addmm: (("input", "mat1", "mat2"), ("mat1", "mat2")),  # Conv1D of GPT-2, its weight lying transposed
}
PACKED = functional.multi_head_attention_forward
NORMS = {functional.layer_norm, functional.rms_norm}
NORMED = "_testreg_normed"  # on a tensor: a norm made it


class Linears(TorchFunctionMode):
    """Inside the `with`, `meet` sees input and weight of each product with a weight of `model`, and may change both.

    No module is touched, and what it sees is what is multiplied: behind whatever a patch does in front of a linear.
    Inside `nn.MultiheadAttention` the input of the output projection is out of reach; its weight is not.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {id(weight): name for name, weight, _ in linears(model)}

    def meet(self, name: str, tokens: Tensor | None, weight: Tensor) -> tuple[Tensor | None, Tensor]:
        """The input `(..., channels)`, if it is in reach, and the weight of the linear called `name`."""
        return tokens, weight

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in OPERANDS:
            order, (tokens, weight) = OPERANDS[function]
            given = {**dict(zip(order, args, strict=False)), **kwargs}
            if (name := self.names.get(id(given[weight]))) is not None:
                given[tokens], given[weight] = self.meet(name, given[tokens], given[weight])
                return function(**given)
        if function is PACKED and id(args[5]) in self.names:
            return function(*self._packed(args), **kwargs)
        made = function(*args, **kwargs)
        joined = (args[0] if args else kwargs["tensors"]) if function is torch.cat else ()  # registers and a norm's
        if function in NORMS or any(map(normed, joined)):
            setattr(made, NORMED, True)
        return made

    def _packed(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of `nn.MultiheadAttention` for self-attention, whose query, key and value are one tensor."""
        query, key, value, *rest = args
        tokens, rest[2] = self.meet(self.names[id(rest[2])], query, rest[2])
        _, rest[8] = self.meet(self.names[id(rest[8])], None, rest[8])
        return tokens, tokens if key is query else key, tokens if value is query else value, *rest


def normed(tokens: Tensor) -> bool:
    """Whether a norm made what a linear is given, so that its tokens are alike."""
    return hasattr(tokens, NORMED)


def linears(model: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Name, weight and axis of the output channels of every linear of `model`."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module.weight, 0
        elif type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), Tensor):
            yield name, module.weight, 1
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            yield f"{name}.in_proj", module.in_proj_weight, 0
