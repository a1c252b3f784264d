"""Tiny models that do something in every block, and what they give, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[int], Mapping[str, Any]]  # so many images -> what the model is called with


@torch.no_grad()
def unit_gain(model: nn.Module) -> None:
    """Random weights of unit gain, in place: with the usual initial ones, a tiny block does next to nothing."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)) and name == "weight":
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            elif "Norm" in type(module).__name__ and name == "weight":
                parameter.normal_(1, 0.1)
            elif parameter.ndim:
                parameter.normal_(0, 0.3)


def tensors(output: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor in a model's output, by its path: pooled, logits, hidden states, attentions, feature maps, text."""
    if isinstance(output, Tensor):
        return {path: output}
    items: Iterable[tuple[Any, Any]]
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, (list, tuple)):
        items = enumerate(output)
    else:
        return {}
    return {
        where: tensor for key, value in items for where, tensor in tensors(value, f"{path}.{key}".lstrip(".")).items()
    }


def outputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """`tensors` of one forward pass without gradients."""
    with torch.no_grad():
        return tensors(model(**inputs))


def close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str, *, exact: bool = False) -> None:
    """Whether two outputs are the same, to rounding or bit for bit.

    Raises:
        AssertionError: they are not; the message says `what` was tried, and where they differ.
    """
    if found.keys() != wanted.keys():
        raise AssertionError(f"{what}: the outputs are {sorted(found)}, and should be {sorted(wanted)}.")
    limit = 0.0 if exact else 1e-5
    for path, tensor in wanted.items():
        try:
            torch.testing.assert_close(found[path], tensor, rtol=limit, atol=limit, equal_nan=True)
        except AssertionError as error:
            raise AssertionError(f"{what}: the output {path or 'of the model'} differs. {error}") from error


def clone(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in inputs.items()}


def images_of(inputs: Mapping[str, Any]) -> str:
    """The argument that holds the images."""
    return next(name for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point())
