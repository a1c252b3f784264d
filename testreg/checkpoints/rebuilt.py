"""Whether a model can be rebuilt: its class and its config must give the modules and weights that are in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..runtime.errors import UnsupportedModel
from ..runtime.modeling_testreg import first_line, skeleton

MOST = 3  # differences of one kind that an error names
# What acts in training alone, so that one may stand for the other.
PASSIVE = ("Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "DropPath")
# What a difference's names, or the types there, hold -> what gets past it.
WAYS = {
    "lora_": "Merge the adapters into the weights first: adapted.merge_and_unload() of peft, then patch and save that.",
    "base_layer": "Merge the adapters into the weights first, or take them off, then patch and save.",
    "parametrizations": "First torch.nn.utils.parametrize.remove_parametrizations(MODULE, NAME), then save.",
    "weight_g": "First torch.nn.utils.remove_weight_norm(MODULE), then save.",
    "weight_orig": "First torch.nn.utils.prune.remove(MODULE, NAME) or remove_spectral_norm(MODULE), then save.",
    "DTensor": "Gather the weights of all processes into a model of its own first, then patch and save that.",
    **dict.fromkeys(
        ("uant", "_packed_params", "_scale", "Tensor"),
        "Save the model as it was before it was quantised, and quantise what testreg.load gives.",
    ),
}
ELSE = (
    "Where it is meant to be so, say it in model.config (num_labels, num_hidden_layers, image_size, hidden_act, ...) "
    "and build the model from that; or keep the plan, testreg.active(model).plan.save(FILE), and patch the model that "
    "you build yourself."
)


def check_rebuilt(model: PreTrainedModel, **init: bool) -> dict[str, Tensor]:
    """Whether the class of `model` builds it from its config, so that what is saved can be loaded, and is the same.

    Args:
        init: what the class is built with beside its config.

    Returns:
        Copies of the weights that were tied by hand, by name: a checkpoint holds each of them, and what is loaded
        computes the same, with weights that are no longer tied.

    Raises:
        UnsupportedModel: the class builds another model; the message has the names.
    """
    try:
        config = type(model.config).from_dict(json.loads(model.config.to_json_string()))
        twin = skeleton(type(model), config, **init)
    except Exception as error:  # a config that was edited can fail anywhere in the class that reads it
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be built from its own config, so a checkpoint of it could not be loaded: "
            f"{first_line(error)}."
        ) from error
    weights = model.state_dict()
    wanted = twin.state_dict()
    kinds = [
        [f"it has no {name}" for name in wanted if name not in weights],
        [f"it has {name} besides" for name in weights if name not in wanted],
        [*_values(weights, twin)],
        [*_modules(model, twin)],
    ]
    found = [text for kind in kinds for text in (*kind[:MOST], *(["..."] if kind[MOST:] else []))]
    if found:
        said = "; ".join(found)
        way = next((way for part, way in WAYS.items() if any(part in text for kind in kinds for text in kind)), ELSE)
        raise UnsupportedModel(
            f"{type(model).__name__} is not what its class builds from its config, so a checkpoint of it could not be "
            f"loaded as the model that it is now: {said}. Nothing was written. {way}"
        )
    return {name: weights[name].clone() for name in _tied_by_hand(weights, twin)}


def _values(weights: Mapping[str, Any], twin: nn.Module) -> Iterator[str]:
    for name, wanted in twin.state_dict().items():
        weight = weights.get(name, wanted)
        if type(weight) is not Tensor:
            yield f"{name} is a {type(weight).__name__}"
        elif weight.shape != wanted.shape:
            yield f"{name} has the shape {tuple(weight.shape)}, not {tuple(wanted.shape)}"
        elif weight.is_floating_point() != wanted.is_floating_point():
            yield f"{name} is of {weight.dtype}, as quantised weights are"
    for one, *others in _ties(twin):
        for other in others:
            first: Any
            second: Any
            first, second = weights.get(one), weights.get(other)
            here = isinstance(first, Tensor) and isinstance(second, Tensor) and not (first.is_meta or second.is_meta)
            if here and not torch.equal(first, second):
                yield f"{one} and {other} differ, which its config ties"


def _modules(model: nn.Module, twin: nn.Module) -> Iterator[str]:
    """What no weight tells: another activation function, another epsilon."""
    wanted = dict(twin.named_modules(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        other = wanted.get(name, module)
        kinds = type(module), type(other)
        if {kind.__name__ for kind in kinds} <= set(PASSIVE):
            continue
        if kinds[0] is not kinds[1]:
            alike = kinds[0].__name__ == kinds[1].__name__
            given, expected = (f"{kind.__module__}.{kind.__name__}" if alike else kind.__name__ for kind in kinds)
            yield f"{name} is a {given}, not a {expected}"
        elif module.extra_repr() != other.extra_repr():
            yield f"{name} is {kinds[0].__name__}({module.extra_repr()}), not with {other.extra_repr()}"


def _tied_by_hand(weights: Mapping[str, Tensor], twin: nn.Module) -> set[str]:
    """Names of weights that lie where another one does, and that the class does not tie."""
    groups = {name: names[0] for names in _ties(twin) for name in names}
    spans = sorted((*_span(weight), name) for name, weight in weights.items() if weight.numel() and not weight.is_meta)
    shared = set()
    end, last = 0, ""
    for start, stop, name in spans:
        if start < end and (groups.get(name, name) != groups.get(last, last)):
            shared.add(last if name in groups else name)
        if stop > end:
            end, last = stop, name
    return shared


def _ties(twin: nn.Module) -> list[list[str]]:
    """Groups of names that the class gives one weight."""
    groups: dict[int, list[str]] = {}
    for name, weight in twin.named_parameters(remove_duplicate=False):
        groups.setdefault(id(weight), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _span(weight: Tensor) -> tuple[int, int]:
    """Where a weight's memory begins and ends."""
    last = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    return weight.data_ptr(), weight.data_ptr() + (last + 1) * weight.element_size()
