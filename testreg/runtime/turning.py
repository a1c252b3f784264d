"""Turn rotary keys to other positions, whatever a family's layout: told by keys of the model itself, not by its name.

A rotary attention turns pairs of channels of a key by its position times a frequency. Families differ in which channels
make a pair, how many turn, and where they lie. The tables that turn by some distance come from the model itself, as it
makes them for that position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedModel
from .prefix import Recorder, cache_name_of, placed_on
from .towers import Tower

AT, NEAR, FAR = 3, 5, 0.75  # a position, and two distances (one as a share of the whole) that tell layouts apart


@dataclass(frozen=True)
class Layout:
    """Which channels of a key turn.

    Attributes:
        halves: channel i is paired with the one half of the turned ones further on; else with its neighbour.
        last: the turned channels are the last ones; else the first.
    """

    halves: bool
    last: bool

    def turn(self, keys: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Keys `(batch, heads, tokens, channels)` turned by tables `(batch, tokens or 1, pairs)`, in float32."""
        turned = 2 * cosines.shape[-1]
        start = keys.shape[-1] - turned if self.last else 0
        part = keys[..., start : start + turned].float()
        cosines, sines = cosines[:, None].float(), sines[:, None].float()  # (batch, 1, tokens or 1, pairs)
        if self.halves:
            first, second = part.chunk(2, dim=-1)
        else:
            first, second = part[..., 0::2], part[..., 1::2]
        first, second = first * cosines - second * sines, second * cosines + first * sines
        part = torch.cat([first, second], -1) if self.halves else torch.stack([first, second], -1).flatten(-2)
        return torch.cat([keys[..., :start], part.to(keys.dtype), keys[..., start + turned :]], dim=-1)


LAYOUTS = tuple(Layout(halves, last) for halves in (True, False) for last in (False, True))


@dataclass(frozen=True)
class Turning:
    """How the keys of one block turn.

    Attributes:
        frequencies: radians per position `(pairs,)`, in double precision.
    """

    layout: Layout
    frequencies: Tensor

    def turn(self, keys: Tensor, distances: Tensor) -> Tensor:
        """Keys `(batch, heads, tokens, channels)` at positions that are greater by `distances` `(batch,)`."""
        angles = distances.to(keys.device).double()[:, None, None] * self.frequencies.to(keys.device)
        return self.layout.turn(keys, angles.cos(), angles.sin())  # tables (batch, 1, pairs)


def turnings(tower: Tower, longest: int) -> list[Turning]:
    """Each block's: the one that takes its keys at one position to those at another, near by and far away.

    Args:
        longest: how far positions reach.

    Raises:
        UnsupportedModel: none does.
    """
    far = max(NEAR + 1, int(FAR * longest) - AT)
    one, here, near, there = (_shown(tower, torch.tensor([[at]])) for at in (1, AT, AT + NEAR, AT + far))
    found = []
    for index, (given, _) in enumerate(one):
        cosines, sines = _pairs(tower, given)
        frequencies = torch.atan2(
            sines.double(), cosines.double()
        ).flatten()  # a turn by one position is less than half
        options = (Turning(layout, frequencies) for layout in LAYOUTS)
        keys, *wanted = (shown[index][1] for shown in (here, near, there))
        for option in options:
            if 2 * len(frequencies) > keys.shape[-1] or not _same(option.turn(keys, torch.tensor([NEAR])), wanted[0]):
                continue
            if not _same(option.turn(keys, torch.tensor([far])), wanted[1]):
                raise refused(tower, f"in block {index} a turn by {far} positions is not {far} turns by one")
            found.append(option)
            break
        else:
            raise refused(tower, f"its keys in block {index} do not turn as rotary ones do")
    return found


def trained(tower: Tower) -> int:
    """How many positions the model was trained on."""
    config = tower.module.config
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    rope = getattr(config, "rope_parameters", None) or {}
    longest = getattr(config, "max_position_embeddings", None)
    if rope.get("rope_type") in ("dynamic", "longrope"):  # their frequencies change beyond
        longest = rope.get("original_max_position_embeddings") or longest
    if not isinstance(longest, int):
        raise refused(tower, "its config does not say how many positions it was trained on")
    return min(longest, 2 * sliding) if isinstance(sliding, int) else longest


def refused(tower: Tower, reason: str) -> UnsupportedModel:
    """An error that names the model and its kind of rotary positions."""
    rope = getattr(tower.module.config, "rope_parameters", None) or {}
    kind = rope.get("rope_type") or ", ".join(sorted(map(str, rope))) or "none"
    return UnsupportedModel(
        f"keys of {type(tower.module).__name__} (rope type: {kind}) cannot be turned to other positions: {reason}. A "
        f"text without end needs that; use another cache."
    )


def _same(keys: Tensor, wanted: Tensor) -> bool:
    scale = wanted.float().abs().max().clamp(min=1e-6)
    coarse = torch.finfo(wanted.dtype).eps * 8
    return bool(((keys.float() - wanted.float()).abs().max() / scale) <= max(2e-3, coarse))  # tables are of float32


def _shown(tower: Tower, positions: Tensor) -> list[tuple[Any, Tensor]]:
    """For every block, the tables that its attention is given at `positions`, and the keys that it makes.

    The tokens are dummies, the same at all positions, in the first block; later blocks have what follows from them.
    """
    seen: dict[int, Any] = {}
    recorders = [Recorder() for _ in tower.attentions]
    fixed = _dummies(tower, positions)

    def before(index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            seen[index] = kwargs.get("position_embeddings")
            name = "hidden_states"
            tokens = fixed.to(args[0] if args else kwargs[name])
            given = {**kwargs, cache_name_of(module): recorders[index]}
            return ((tokens, *args[1:]), given) if args else ((), {**given, name: tokens})

        return hook

    handles = [
        attention.register_forward_pre_hook(before(index), with_kwargs=True)
        for index, attention in enumerate(tower.attentions)
    ]
    try:
        with torch.no_grad():
            ids = torch.zeros_like(positions)
            device = placed_on(tower)
            forward = type(tower.module).forward
            forward(tower.module, input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [(seen[index], recorder.keys) for index, recorder in enumerate(recorders)]


def _dummies(tower: Tower, positions: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 1, tower.channels, generator=generator).expand(*positions.shape, -1)


def _pairs(tower: Tower, given: Any) -> tuple[Tensor, Tensor]:
    """One cosine and sine per pair, without a factor, of tables in any of the usual orders."""
    if not (isinstance(given, tuple) and len(given) == 2 and all(isinstance(table, Tensor) for table in given)):
        raise refused(tower, "its attention gets no tables of cosines and sines")
    cosines, sines = (table.float() for table in given)
    if cosines.ndim != 3:
        raise refused(tower, f"its tables have {cosines.ndim} dimensions, not (batch, tokens, channels)")
    half = cosines.shape[-1] // 2
    if torch.equal(cosines[..., :half], cosines[..., half:]) and torch.equal(sines[..., :half], sines[..., half:]):
        cosines, sines = cosines[..., :half], sines[..., :half]
    elif torch.equal(sines[..., 0::2], sines[..., 1::2]):
        cosines, sines = cosines[..., 0::2], sines[..., 0::2]
    size = (cosines.square() + sines.square()).sqrt()
    return cosines / size, sines / size
