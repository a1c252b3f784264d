"""Where a causal language model keeps its parts, told by its structure: no list of classes.

A block is whatever holds an attention that keeps keys and values in a cache; the MLP's second linear is the last linear
of a block, outside the attention, that gives as many channels as the residual stream has.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .errors import BadPlan, UnsupportedModel
from .families import Family
from .plan import RegisterPlan
from .towers import Tower, find_tower, resolve

LANGUAGE = "language"  # the family of every causal language model
CACHES = ("past_key_values", "past_key_value", "layer_past")  # what attentions call their cache


def find_decoder(model: Any) -> Tower:
    """The language model that `model` is or holds, without its head.

    Its `downs` are None, and its `neurons` 0, in blocks whose MLP has no second linear, as of a mixture of experts.

    Raises:
        UnsupportedModel: it holds none, or one whose attention cannot have registers.
    """
    model = model if isinstance(model, nn.Module) else getattr(model, "model", model)  # the latter in a pipeline
    blocks, decoder = find_blocks(model), decoder_of(model)
    names = {module: name for name, module in model.named_modules()}
    channels = int(decoder.config.get_text_config().hidden_size)
    attentions = [_attention(decoder, index, block) for index, block in enumerate(blocks)]
    downs = [second_linear(block, attentions[index], channels) for index, block in enumerate(blocks)]
    holder = next(
        name for name, part in decoder.named_modules() if isinstance(part, nn.ModuleList) and blocks[0] in part
    )
    row = Family(
        type(decoder).__name__,
        blocks=holder,
        down=_paths(blocks, downs) or "mlp.down_proj",
        attention=_paths(blocks, attentions),
        prefix=0,
        package=type(decoder).__module__.split(".")[0],
    )
    return Tower(
        path=names.get(decoder, ""),
        family=LANGUAGE,
        row=row,
        module=decoder,
        blocks=tuple(blocks),
        downs=tuple(downs),
        attentions=tuple(attentions),
        seed=None,
        prefix=0,
        channels=channels,
        neurons=tuple(0 if down is None else matrix(down).shape[1] for down in downs),
    )


def tower_of(model: Any, plan: RegisterPlan) -> Tower:
    """What `plan` is for: the language model, or the vision tower, that `model` is or holds.

    Raises:
        UnsupportedModel: there is none.
        BadPlan: the model is of the other kind.
    """
    find, other = (find_decoder, find_tower) if plan.language else (find_tower, find_decoder)
    try:
        return find(model)
    except UnsupportedModel as error:
        try:
            other(model)
        except UnsupportedModel:
            raise error from None
    kinds = "a language model", "a Vision Transformer"
    mine, its = kinds if plan.language else kinds[::-1]
    raise BadPlan(f"the plan is one of {mine}, but {type(model).__name__} is {its}: it was made for another model.")


def towers_of(model: Any) -> list[Tower]:
    """The vision tower and the language model that `model` is or holds.

    Raises:
        UnsupportedModel: it holds neither.
    """
    found, failed = [], []
    for find in (find_tower, find_decoder):
        try:
            found.append(find(model))
        except UnsupportedModel as error:
            failed.append(error)
    if not found:
        raise failed[getattr(model, "main_input_name", "") == "input_ids"]
    return found


def found_again(tower: Tower) -> Tower:
    """The same tower, as it is built now."""
    if tower.family == LANGUAGE:
        return replace(find_decoder(tower.module), path=tower.path)
    return resolve(tower.path, tower.module, tower.family, tower.row)


def decoder_of(model: Any) -> Any:
    """The language model inside a model, without its head."""
    return getattr(model, "get_decoder", lambda: None)() or model


def find_blocks(model: Any) -> list[nn.Module]:
    """The blocks of a causal language model.

    Raises:
        UnsupportedModel: it is none, or has no attention.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if getattr(model, "main_input_name", None) != "input_ids" or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{name} is no causal language model, and text is for those. A Vision Transformer is looked at with "
            f"images: testreg.find(model, images) (--images FOLDER instead of --text)."
        )
    lists = [module for module in decoder_of(model).modules() if isinstance(module, nn.ModuleList)]
    found = [list(blocks) for blocks in lists if any(attentions_of(block) for block in blocks)]
    if not found:
        raise UnsupportedModel(f"{name} has no blocks with attention, so no attention sinks.")
    return max(found, key=len)


def attentions_of(block: nn.Module) -> list[nn.Module]:
    """All attention modules of a block, an outer one before those that it holds."""
    return [module for module in block.modules() if type(module).__name__.endswith("Attention")]


def cache_name(attention: nn.Module) -> str | None:
    """What the attention calls its cache; None where it takes none."""
    names = inspect.signature(type(attention).forward).parameters
    return next((name for name in CACHES if name in names), None)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear: torch's, a quantised one, or GPT-2's own."""
    return hasattr(module, "in_features") or type(module).__name__ == "Conv1D"


def matrix(linear: Any) -> Tensor:
    """The weight of a linear, `(outputs, inputs)`; GPT-2's has them the other way round."""
    weight: Tensor = linear.weight
    return weight.T if type(linear).__name__ == "Conv1D" else weight


def second_linear(block: nn.Module, attention: nn.Module, channels: int) -> Any:
    """The MLP's second linear, or None where several experts have one each, or none is a linear."""
    apart = set(attention.modules())
    for part in block.modules():
        if isinstance(part, nn.ModuleList):
            apart |= set(part.modules())
    linears = [part for part in block.modules() if is_linear(part) and part not in apart]
    fitting = [part for part in linears if matrix(part).shape[0] == channels]
    return fitting[-1] if fitting else None


def _paths(blocks: list[nn.Module], parts: list[Any]) -> tuple[str, ...]:
    """Where the parts are in their blocks, each place once."""
    pairs = zip(blocks, parts, strict=True)
    found = (next((path for path, module in block.named_modules() if module is part), None) for block, part in pairs)
    return tuple(dict.fromkeys(path for path in found if path))


def _attention(decoder: Any, index: int, block: nn.Module) -> nn.Module:
    name = type(decoder).__name__
    caching = [attention for attention in attentions_of(block) if cache_name(attention)]
    # Some wrap the attention proper in a module that hands all arguments on.
    inner = [one for one in caching if not any(other is not one and other in one.modules() for other in caching)]
    if len(inner) != 1:
        kinds = ", ".join(type(one).__name__ for one in attentions_of(block)) or "none"
        raise UnsupportedModel(
            f"block {index} of {name} has {len(inner) or 'no'} attentions that keep keys and values in a cache (its "
            f"attentions: {kinds}): registers of a language model need exactly one in every block."
        )
    attention: Any = inner[0]
    arguments = inspect.signature(type(attention).forward).parameters
    if getattr(decoder.config, "alibi", "alibi" in arguments or "position_bias" in arguments):
        raise UnsupportedModel(
            f"the attention of {name} ({type(attention).__name__}) adds a bias for the distance between tokens "
            f"(ALiBi), which has no place for a register."
        )
    if getattr(attention, "is_causal", True) is False:
        raise UnsupportedModel(f"{name} attends to later tokens as well: it is an encoder, no causal language model.")
    return attention
