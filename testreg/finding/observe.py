"""Look inside a vision tower while it runs: block outputs, attention maps, keys. Registers are never among them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.decoders import find_decoder
from ..runtime.errors import UnsupportedModel
from ..runtime.families import Tower, find_tower
from ..runtime.installer import Patch, active, patch
from ..runtime.plan import RegisterPlan

NOTHING = RegisterPlan({}, registers=0)  # of several patches the last one acts, so this one switches the others off


@dataclass
class Seen:
    """What the last forward pass inside `observe` did; blocks from 0, every tensor without registers.

    Attributes:
        states: block -> residual stream after it `(batch, tokens, channels)`, prefix tokens first.
        attentions: block -> attention `(batch, heads, tokens, tokens)`; rows sum to less than 1 where registers took
            the rest.
        keys: block -> keys of all heads side by side, before any rotation, `(batch, tokens, channels)`.
    """

    states: dict[int, Tensor] = field(default_factory=dict)
    attentions: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def observe(
    model: nn.Module, *, states: Iterable[int] = (), attentions: Iterable[int] = (), keys: Iterable[int] = ()
) -> Iterator[Seen]:
    """Keep what the named blocks do in the forward passes inside the `with`; the model is as before afterwards.

    Attention maps need the attention implementation that returns them ("eager"), which is set meanwhile.

    Raises:
        UnsupportedModel: the model's attention gives no maps, or has no key projection that can be read.
    """
    tower, seen = find_tower(model), Seen()
    handles: list[Any] = []
    attentions = tuple(attentions)
    try:
        for block in states:
            handles.append(tower.blocks[block].register_forward_hook(_keep_state(seen, block)))
        for block in keys:
            handles.append(_keep_keys(tower, seen, block))
        for block in attentions:
            handles += _keep_attention(tower, seen, block)
        with eager(tower.module) if attentions else _unchanged():
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def unpatched(model: nn.Module) -> Patch:
    """The model as it was before any patch, inside a `with`; whatever patch acts now acts again afterwards."""
    return patch(model, NOTHING)


def run(model: nn.Module, inputs: Mapping[str, Tensor], *, whole: bool = False) -> Any:
    """One forward pass without gradients, at any image size that the model can take.

    Args:
        inputs: what the image processor gives, on any device and in any float type.
        whole: run the whole model where it takes images alone (a classifier), not just its vision tower.
    """
    if "input_ids" in inputs:
        return read_text(model, find_decoder(model), inputs["input_ids"])
    tower = find_tower(model)
    module = model if whole and getattr(model, "main_input_name", "") == "pixel_values" else tower.module
    weight = next(module.parameters())
    device = "cpu" if weight.is_meta else weight.device  # accelerate takes them to where it loads the weights
    placed: dict[str, Any] = {
        name: value.to(device, weight.dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }
    names = inspect.signature(module.forward).parameters
    if "interpolate_pos_encoding" in names:
        placed["interpolate_pos_encoding"] = True  # changes nothing at the size the model was trained at
    first = () if "pixel_values" in names or "pixel_values" not in placed else (placed.pop("pixel_values"),)  # timm's x
    with torch.no_grad():
        return module(*first, **placed)


def grid(height: int, width: int, patches: int) -> tuple[int, int]:
    """Rows and columns of `patches` square patches that cover an image of `height` by `width` pixels.

    Raises:
        UnsupportedModel: no grid of square patches has that many.
    """
    for size in range(1, min(height, width) + 1):  # both counts only fall with the size, so the first match is the one
        if (height // size) * (width // size) == patches:
            return height // size, width // size
    raise UnsupportedModel(
        f"{patches} patches are no grid of square ones on an image of {height} × {width} pixels; "
        f"maps can only be drawn for models that keep every patch in its place."
    )


def _keep_state(seen: Seen, block: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.states[block] = output[0] if isinstance(output, tuple) else output

    return hook


def _keep_attention(tower: Tower, seen: Seen, block: int) -> list[Any]:
    attention: Any = tower.attentions[block]

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if not (isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor)):
            raise UnsupportedModel(
                f"the attention of {type(tower.module).__name__} ({type(module).__name__}) gives no attention maps, "
                f"with the eager implementation either."
            )
        seen.attentions[block] = output[1]

    def weights(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        registers = _registers(tower, block)
        seen.attentions[block] = args[0][..., registers:, registers:]

    if isinstance(attention, nn.MultiheadAttention):
        wanted = {"need_weights": True, "average_attn_weights": False}
        asked = attention.register_forward_pre_hook(
            lambda module, args, kwargs: (args[:4], {**kwargs, **wanted}), with_kwargs=True
        )
        return [asked, attention.register_forward_hook(hook)]
    if isinstance(getattr(attention, "fused_attn", None), bool):  # timm's, whose weights pass a dropout
        return [attention.attn_drop.register_forward_pre_hook(weights), _Unfused(attention)]
    return [attention.register_forward_hook(hook)]


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
    return current.plan.registers if current and block >= current.plan.entry else 0


def _keep_keys(tower: Tower, seen: Seen, block: int) -> Any:
    attention = tower.attentions[block]

    def keep(keys: Tensor) -> None:
        seen.keys[block] = keys[:, _registers(tower, block) :]

    for name, part in attention.named_modules():
        last = name.split(".")[-1]
        if last in ("k_proj", "key"):
            return part.register_forward_hook(lambda module, args, output: keep(output))
        if last == "qkv":  # one linear for queries, keys and values
            return part.register_forward_hook(lambda module, args, output: keep(output.chunk(3, dim=-1)[1]))
    if isinstance(attention, nn.MultiheadAttention) and attention.in_proj_weight is not None:
        weight, bias = attention.in_proj_weight, attention.in_proj_bias

        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            source = args[1] if len(args) > 1 else kwargs["key"]
            keys = nn.functional.linear(source, weight.chunk(3)[1], None if bias is None else bias.chunk(3)[1])
            keep(keys if attention.batch_first else keys.transpose(0, 1))

        return attention.register_forward_pre_hook(hook, with_kwargs=True)
    raise UnsupportedModel(
        f"the attention of {type(tower.module).__name__} ({type(attention).__name__}) has no key projection among "
        f"k_proj, key, qkv and in_proj_weight: its keys cannot be read."
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
def _unchanged() -> Iterator[None]:
    yield


def read_text(model: Any, tower: Tower, ids: Tensor) -> None:
    """One pass of a language model, without its head and without gradients, over ids `(sequences, tokens)`."""
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        tower.module(input_ids=ids.to("cpu" if device.type == "meta" else device), use_cache=False)
