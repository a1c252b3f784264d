"""Registers of a language model: constant keys and values in front of those of all tokens, in every attention.

An attention hands new keys and values to its cache and gets all of them back. Here it finds a `Front` where its cache
would be, which puts the registers' in front of what the cache gives. Norms, rotary tables, shared heads and windows
stay the attention's own business, and the cache holds what it always held.

The registers' keys and values are what the attention itself makes of the plan's rows, once, where they stand: in front
of the first token, or on its place.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .decoders import cache_name
from .errors import TestregError, UnsupportedModel
from .forwards import ATTENTION, Forward
from .plan import BEFORE, ON
from .relay import Placed, Relay
from .towers import Tower

COPIES = 16  # of the registers, when they are measured: products of single rows depend on where weights lie in memory
MASKED = ("eager", "sdpa")  # attention implementations that take any mask
FILLED = "_testreg"  # on a cache: which plan it was filled with


class Front:
    """Stands for a cache, or for none, inside one call of an attention.

    Args:
        cache: the attention's own; None where nothing is cached.
        keys, values: of the registers, `(1, heads, registers, head channels)` each.
        whole: attention looks at all that the cache gives; else, without a mask, at the tokens of this call alone,
            whatever room a static cache has behind them.
    """

    def __init__(self, cache: Any, keys: Tensor, values: Tensor, *, whole: bool):
        self._cache, self._keys, self._values, self._whole = cache, keys, values, whole

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What the cache gives for keys and values `(batch, heads, tokens, head channels)`, registers in front."""
        if self._cache is not None:
            tokens = keys.shape[-2]
            keys, values = self._cache.update(keys, values, *args, **kwargs)
            if not self._whole:
                keys, values = keys[..., :tokens, :], values[..., :tokens, :]
        return _join(self._keys, keys), _join(self._values, values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class Recorder:
    """Stands for a cache where an attention shows what it makes of tokens."""

    def __init__(self) -> None:
        self.keys = self.values = torch.empty(0)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys.detach(), values.detach()
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing is kept from call to call."""
        return 0


def cache_name_of(attention: nn.Module) -> str:
    """What a decoder's attention calls its cache."""
    return cache_name(attention) or ""


class Prefixed(Forward):
    """An attention with registers in front of its keys and values; its queries, output and cache are the tokens'."""

    def __init__(self, relay: Relay, index: int, module: nn.Module):
        super().__init__(relay, index, module)
        self.cache = cache_name_of(module)
        self.rows = Placed(relay.plan.state[index - relay.plan.entry])  # type: ignore[index]
        self.keys = self.values = Placed(torch.empty(0))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.off:
            return self.original(*args, **kwargs)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        first = given.pop(self.names[0])  # (batch, tokens, channels)
        self.relay.here.acted |= ATTENTION
        check_masks(self.module)
        if self.relay.measuring:
            return self._measured(first, given)
        registers, cache = self.relay.plan.registers, given.get(self.cache)
        if cache is not None and self.index == self.relay.plan.entry:
            self._own(cache)
        mask = given.get("attention_mask")
        whole = mask is not None or first.shape[1] == 1
        given[self.cache] = Front(cache, self.keys.like(first), self.values.like(first), whole=whole)
        given["attention_mask"] = open_mask(mask, registers, first)
        output = self.original(first, **given)
        if not (isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor)):
            return output
        if self.relay.record is not None:
            self.relay.record.attentions[self.index] = output[1]
        return (output[0], output[1][..., registers:], *output[2:])

    def _measured(self, first: Tensor, given: dict[str, Any]) -> Any:
        """Keep the keys and values that the attention makes of the rows, as many as there are dummy tokens."""
        given[self.cache] = recorder = Recorder()
        output = self.original(self.rows.like(first).expand_as(first).contiguous(), **given)
        shape = (len(first), *recorder.keys.shape[1:2], first.shape[1])
        if recorder.keys.shape[:-1] != shape or recorder.values.shape[:-1] != shape:
            raise UnsupportedModel(
                f"the attention of block {self.index} ({type(self.module).__name__}) hands its cache keys of the shape "
                f"{tuple(recorder.keys.shape)}, not (batch, heads, tokens, channels): registers cannot join them."
            )
        self.keys, self.values = Placed(recorder.keys[:1].clone()), Placed(recorder.values[:1].clone())
        return output

    def _own(self, cache: Any) -> None:
        """Whether the cache was filled under this plan, or is empty.

        Raises:
            TestregError: it was filled without registers, or with others.
        """
        mine, mark = self.relay.plan.digest, getattr(cache, FILLED, None)
        if mark == mine:
            return
        if not torch.compiler.is_compiling() and int(cache.get_seq_length(getattr(self.module, "layer_idx", 0))):
            how = "without registers" if mark is None else "under another plan"
            raise TestregError(
                f"the cache that was given was filled {how}, so that its keys do not go with these registers: begin "
                f"with an empty one, or take the patch off, testreg.active(model).remove(), to go on with it."
            )
        setattr(cache, FILLED, mine)


class Later(Forward):
    """A learned table of positions in which tokens stand as many places later as there are registers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.off or self.relay.measuring:
            return self.original(*args, **kwargs)
        twin = nn.Module.__new__(type(self.module))
        twin.__dict__.update(self.module.__dict__)
        weight: Any = self.module.weight[self.relay.plan.registers :]  # type: ignore[index]
        twin.__dict__["_parameters"] = {"weight": weight}
        return type(self.module).forward(twin, *args, **kwargs)


def shifted(relay: Relay) -> list[Forward]:
    """What moves tokens on by the registers that stand before them, where positions are learned."""
    if relay.plan.positions == ON or rotary(relay.tower):
        return []
    return [Later(relay, 0, table) for table in tables(relay.tower)]


def as_first_tokens(tower: Tower) -> tuple[Tensor, Tensor]:
    """Keys and values `(blocks, heads, registers, channels)` of the acting registers, for text that comes behind them.

    Registers take the first positions, and the text counts from there on, as where they lie in a cache.
    """
    worn: list[Prefixed] = [attention.forward.__self__ for attention in tower.attentions]  # type: ignore[attr-defined]
    relay = worn[0].relay
    measure(tower, relay, onward=relay.plan.registers)
    keys, values = (torch.cat([getattr(one, name).value for one in worn]) for name in ("keys", "values"))
    measure(tower, relay)
    return keys, values


def measure(tower: Tower, relay: Relay, *, onward: int = 0) -> None:
    """Let every attention with registers show what keys and values it makes of them where they stand.

    Args:
        onward: by how many positions they stand further on, where positions are rotary.
    """
    plan, decoder = relay.plan, tower.module
    if plan.positions == BEFORE and not rotary(tower) and not tables(tower):
        raise UnsupportedModel(
            f"how {type(decoder).__name__} tells positions cannot be seen, so that no register can stand before its "
            f'first token; positions="on" puts them on its place.'
        )
    device = placed_on(tower)
    ids = torch.zeros(COPIES, plan.registers, dtype=torch.long, device=device)
    count = torch.arange(plan.registers, device=device).expand(COPIES, -1)
    turning = rotary(tower)
    where = torch.zeros_like(count) if plan.positions == ON else count - plan.registers * turning  # (copies, registers)
    where = where + onward * turning
    asked = {"position_ids": where} if "position_ids" in inspect.signature(type(decoder).forward).parameters else {}
    relay.measuring = True
    try:
        with torch.no_grad():
            decoder(input_ids=ids, use_cache=False, **asked)
    finally:
        relay.measuring = False


def placed_on(tower: Tower) -> torch.device:
    """Where the decoder takes its token ids."""
    decoder: Any = tower.module
    weight = decoder.get_input_embeddings().weight
    return torch.device("cpu") if weight.is_meta else weight.device  # accelerate takes them to where weights are


def rotary(tower: Tower) -> bool:
    """Whether attention turns keys and queries by their positions, so that only distances count."""
    return any("Rotary" in type(part).__name__ for part in tower.module.modules())


def tables(tower: Tower) -> list[nn.Module]:
    """The learned tables of positions that the decoder adds to the embeddings."""
    decoder: Any = tower.module
    words = decoder.get_input_embeddings()
    longest = getattr(decoder.config, "max_position_embeddings", 0) or 0
    embeddings = [part for part in decoder.modules() if isinstance(part, nn.Embedding) and part is not words]
    return [part for part in embeddings if 0 < longest <= part.num_embeddings]


def check_masks(module: Any) -> None:
    """Whether a module's attention implementation takes masks of any shape.

    Raises:
        UnsupportedModel: it does not.
    """
    kind = getattr(getattr(module, "config", None), "_attn_implementation", None) or MASKED[0]
    if kind not in MASKED:
        raise UnsupportedModel(
            f"{kind} takes no mask with columns in front, which registers and streams need: load the model with "
            f'attn_implementation="sdpa", or model.set_attn_implementation("sdpa").'
        )


def open_mask(mask: Any, registers: int, tokens: Tensor) -> Any:
    """An attention's mask with columns in front that everyone sees.

    Args:
        mask: boolean (True = attend) or additive `(batch, heads or 1, queries, keys)`, `(batch, keys)` with 1 for real
            tokens, or None, which stands for a causal mask over just these tokens.
        tokens: `(batch, queries, channels)`.

    Raises:
        TestregError: a mask of another kind.
    """
    if mask is None:
        queries = tokens.shape[1]
        if queries == 1:
            return None  # of several tokens in a cache it is the last
        causal = torch.ones(queries, registers + queries, dtype=torch.bool, device=tokens.device)
        return causal.tril(registers)[None, None]  # (1, 1, queries, registers + queries)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise TestregError(
            f"registers cannot be put into an attention mask of type {type(mask).__name__}: load the model with "
            f'attn_implementation="sdpa" or "eager".'
        )
    return nn.functional.pad(mask, (registers, 0), value=0 if mask.is_floating_point() else 1)


def _join(front: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([front.to(rest).expand(rest.shape[0], -1, -1, -1), rest], dim=-2)
