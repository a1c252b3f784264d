"""Look inside a vision tower while it runs: block outputs, attention maps, keys. Registers are never among them."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..images.takes import PIXELS
from ..runtime.decoders import find_decoder
from ..runtime.errors import BadImages, UnsupportedModel
from ..runtime.forwards import names as arguments_of
from ..runtime.installer import Patch, active, patch
from ..runtime.plan import RegisterPlan
from ..runtime.towers import Tower, find_tower
from . import maps
from .still import still

NOTHING = RegisterPlan({}, registers=0)  # of several patches the last one acts, so this one switches the others off


@dataclass(frozen=True)
class Projection:
    """Where an attention makes its queries, keys or values: the last part of a linear's name, or its third if fused."""

    what: str
    names: tuple[str, ...]
    third: int


QUERIES = Projection("query", ("q_proj", "query"), 0)
KEYS, VALUES = Projection("key", ("k_proj", "key"), 1), Projection("value", ("v_proj", "value"), 2)


@dataclass
class Seen:
    """What the last forward pass inside `observe` did; blocks from 0, every tensor without registers.

    Attributes:
        states: block -> residual stream after it `(batch, tokens, channels)`, prefix tokens first.
        attentions: block -> attention `(batch, heads, tokens, tokens)`; rows sum to less than 1 where registers took
            the rest.
        attended: block -> what its attention gives, before anything is added to it, `(batch, tokens, channels)`.
        keys, values: block -> those of all heads side by side, before any rotation, `(batch, tokens, channels)`.
    """

    states: dict[int, Tensor] = field(default_factory=dict)
    attentions: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    attended: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def observe(
    model: nn.Module,
    *,
    states: Iterable[int] = (),
    attentions: Iterable[int] = (),
    keys: Iterable[int] = (),
    values: Iterable[int] = (),
    attended: Iterable[int] = (),
) -> Iterator[Seen]:
    """Keep what the named blocks do in the forward passes inside the `with`; the model is as before afterwards.

    Attention maps need the attention implementation that returns them ("eager"), which is set meanwhile.

    Raises:
        UnsupportedModel: the model's attention gives no maps, or has no projection that can be read.
    """
    tower, seen, ear = find_tower(model), Seen(), maps.Ear()
    handles: list[Any] = []
    attentions = tuple(attentions)
    try:
        for block in states:
            handles.append(tower.blocks[block].register_forward_hook(_keep_state(tower, seen, block)))
        for block in keys:
            handles.append(_keep_projected(tower, seen.keys, block, KEYS))
        for block in attended:
            handles.append(tower.attentions[block].register_forward_hook(_keep_attended(tower, seen, block)))
        for block in values:
            handles.append(_keep_projected(tower, seen.values, block, VALUES))
        for block in attentions:
            handles += _keep_attention(tower, seen, block, ear)
        with _giving_maps(tower, ear) if attentions else _unchanged():
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def unpatched(model: nn.Module) -> Patch:
    """The model as it was before any patch, inside a `with`; whatever patch acts now acts again afterwards."""
    return patch(model, NOTHING)


def run(model: nn.Module, inputs: Mapping[str, Tensor], *, whole: bool = False) -> Any:
    """One forward pass in evaluation mode, without gradients and luck, at any image size that the model can take.

    Args:
        inputs: what the image processor gives, on any device and in any float type.
        whole: run the whole model where it takes images alone (a classifier), not just its vision tower.
    """
    if "input_ids" in inputs:
        return read_text(model, find_decoder(model), inputs["input_ids"], whole=whole)
    tower = find_tower(model)
    module = model if whole and _takes_images_alone(model) else tower.module
    weight = next(module.parameters())
    device = "cpu" if weight.is_meta else weight.device  # accelerate takes them to where it loads the weights
    placed: dict[str, Any] = {
        name: value.to(device, weight.dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }
    names = inspect.signature(getattr(module, "_orig_mod", module).forward).parameters  # of what is compiled, if so
    if tower.row.packed:
        placed = _packed(placed, tower, names)
    if "interpolate_pos_encoding" in names:
        placed["interpolate_pos_encoding"] = True  # changes nothing at the size the model was trained at
    if "skip_predictor" in names:
        placed["skip_predictor"] = True  # what V-JEPA guesses of masked patches, at the cost of a second model
    given = next((name for name in PIXELS if name in placed), None)
    first = () if given is None or given in names else (placed.pop(given),)  # timm's x
    with still(module, tower):
        return module(*first, **placed)


def _takes_images_alone(model: nn.Module) -> bool:
    if getattr(model, "main_input_name", "") not in PIXELS:
        return False
    wanted = inspect.signature(model.forward).parameters.values()
    needed = [one.name for one in wanted if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    return set(needed) <= set(PIXELS)


def _packed(inputs: Mapping[str, Any], tower: Tower, names: Collection[str]) -> dict[str, Any]:
    """Inputs with an axis of images as a packed tower has them: without it, and called as its arguments are."""
    if "grid_thw" in names and not any("grid" in name for name in inputs):
        raise BadImages(
            f"{type(tower.module).__name__} takes patches and the grid that they lie in, which its own image processor "
            f"makes: give photos and processor=AutoProcessor.from_pretrained(NAME).image_processor, or what that gave."
        )
    pixels = inputs["pixel_values"]  # (images, patches, ...), or (images, channels, height, width)
    if any("grid" in name for name in inputs) and not tower.row.batch_of_patches:
        pixels = pixels.flatten(0, 1)  # (patches, ...)
    called = {name: name if name in names else name.removeprefix("image_") for name in inputs}
    return {**{called[name]: value for name, value in inputs.items()}, "pixel_values": pixels}


def _keep_state(tower: Tower, seen: Seen, block: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.states[block] = tower.batched(output)

    return hook


def _keep_attended(tower: Tower, seen: Seen, block: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        current = active(tower.module)
        inside = 0 if current and current.plan.form == "attention" else _registers(tower, block)
        seen.attended[block] = tower.batched(output)[:, inside:]

    return hook


def _keep_attention(tower: Tower, seen: Seen, block: int, ear: maps.Ear) -> list[Any]:
    attention: Any = tower.attentions[block]

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        heard = ear.taken()
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor):
            images = len(tower.batched(output))
            heard = output[1] if output[1].ndim > 3 else output[1].unflatten(0, (images, -1))
        if heard is None:
            raise UnsupportedModel(
                f"the attention of {type(tower.module).__name__} ({type(module).__name__}) gives no attention maps, "
                f"with the eager implementation either."
            )
        seen.attentions[block] = heard

    def weights(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        registers = _registers(tower, block)
        seen.attentions[block] = args[0][..., registers:, registers:]

    def listen(module: nn.Module, args: Any) -> None:
        ear.listen(lambda: _registers(tower, block))

    if tower.row.packed and tower.row.segments:
        return [attention.register_forward_hook(_keep_segments(tower, seen, block), with_kwargs=True)]
    if isinstance(attention, nn.MultiheadAttention):
        wanted = {"need_weights": True, "average_attn_weights": False}
        asked = attention.register_forward_pre_hook(
            lambda module, args, kwargs: (args[:4], {**kwargs, **wanted}), with_kwargs=True
        )
        return [asked, attention.register_forward_hook(hook)]
    if isinstance(getattr(attention, "fused_attn", None), bool):  # timm's, whose weights pass a dropout
        return [attention.attn_drop.register_forward_pre_hook(weights), _Unfused(attention)]
    dropout = getattr(attention, "attn_drop", None)
    passed = [dropout.register_forward_pre_hook(lambda module, args: ear.hear(args[0]))] if dropout is not None else []
    return [attention.register_forward_pre_hook(listen), attention.register_forward_hook(hook), *passed]


def _keep_segments(tower: Tower, seen: Seen, block: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = {**dict(zip(arguments_of(module), args, strict=False)), **kwargs}
        found = maps.collected(module, given[tower.row.segments or ""])
        if found is None:
            raise UnsupportedModel(f"the attention of {type(tower.module).__name__} leaves no map of each image.")
        seen.attentions[block] = found

    return hook


class _Unfused:
    """timm's attention computes its weights one by one until `remove`, where it would leave that to a fused kernel."""

    def __init__(self, attention: Any):
        self.attention, self.before = attention, attention.fused_attn
        attention.fused_attn = False

    def remove(self) -> None:
        self.attention.fused_attn = self.before


def _registers(tower: Tower, block: int) -> int:
    """How many registers are in front of the tokens inside a block now."""
    current = active(tower.module)
    return int(current.inside) if current and block >= current.plan.entry else 0


def _keep_projected(tower: Tower, kept: dict[int, Tensor], block: int, which: Projection) -> Any:
    attention = tower.attentions[block]

    def keep(projected: Tensor) -> None:
        kept[block] = tower.turned(projected)[:, _registers(tower, block) :]

    if tower.row.packed:
        raise UnsupportedModel(
            f"{type(tower.module).__name__} packs all images into one sequence: its {which.what}s cannot be read image "
            f"by image."
        )
    for name, part in attention.named_modules():
        last = name.split(".")[-1]
        if last in which.names:
            return part.register_forward_hook(lambda module, args, output: keep(output))
        if last in ("qkv", "in_proj"):  # one linear for queries, keys and values
            return part.register_forward_hook(lambda module, args, output: keep(output.chunk(3, dim=-1)[which.third]))
    weight, bias = (getattr(attention, f"in_proj_{name}", None) for name in ("weight", "bias"))
    if isinstance(weight, Tensor):

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            several = isinstance(attention, nn.MultiheadAttention) and len(args) > 1  # queries, keys and values
            source = kwargs[which.what] if which.what in kwargs else args[which.third] if several else args[0]
            part = None if bias is None else bias.chunk(3)[which.third]
            keep(nn.functional.linear(source, weight.chunk(3)[which.third], part))

        return attention.register_forward_pre_hook(hook, with_kwargs=True)
    raise UnsupportedModel(
        f"the attention of {type(tower.module).__name__} ({type(attention).__name__}) has no {which.what} projection "
        f"among {', '.join(which.names)}, qkv and in_proj_weight: its {which.what}s cannot be read."
    )


@contextmanager
def eager(module: Any) -> Iterator[None]:
    """The attention implementation that gives maps, inside the `with`."""
    config = getattr(module, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if not hasattr(module, "set_attn_implementation") or before == "eager":
        yield
        return
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(before)


@contextmanager
def _giving_maps(tower: Tower, ear: maps.Ear) -> Iterator[None]:
    with maps.leaving(tower) if tower.row.packed and tower.row.segments else eager(tower.module), ear.open():
        yield


@contextmanager
def _unchanged() -> Iterator[None]:
    yield


def read_text(model: Any, tower: Tower, ids: Tensor, *, whole: bool = False) -> Any:
    """One pass of a language model without gradients over ids `(sequences, tokens)`; with its head where `whole`."""
    device = model.get_input_embeddings().weight.device
    ids = ids.to("cpu" if device.type == "meta" else device)
    with torch.no_grad():
        return (model if whole else tower.module)(input_ids=ids, use_cache=False)
