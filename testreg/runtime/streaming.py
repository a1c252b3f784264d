"""`StreamingCache`: text without end in constant memory. The registers stay, the last tokens stay, all else goes.

Positions are counted in the cache, not in the text: when they come near the end of what the model was trained on, all
keys are turned back at once, in float32, and counting goes on from there. A key lives for one window, so it is turned
a few times at most, and nothing drifts. What stays of a text (`keep`) is turned from where it was written each time.

Relatives: StreamingLLM (arXiv 2309.17453), which keeps the first tokens of the text; `keep=4` is that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .decoders import find_decoder
from .errors import TestregError
from .guard import acting_in
from .pieces import Pieces
from .prefix import FILLED
from .turning import Turning, trained, turnings

SPAN = 4  # windows that positions reach over before keys are turned back


class StreamingCache(Cache):
    """Keys and values of the last `window` tokens, for `model(..., past_key_values=cache)` and `generate`.

    Every token sees the last `window` tokens, itself among them, and the model's registers; a prompt that is longer is
    read in pieces. Padding on the left is seen by nobody. Memory, and time per token, do not grow with the text.

    Args:
        model: a causal language model with rotary positions; its patch, if any, has to be on now.
        window: tokens, at most half of what the model was trained on.
        keep: tokens from the beginning of each text, padding apart, that stay too, right before the window (of a piece
            of several tokens, that of its first), as in StreamingLLM, which has 4. By default none where the model has
            registers; a model without them needs a number: 0 = a window alone.

    Raises:
        TestregError: the model has no registers and `keep` is not given, or the window is out of range.
        UnsupportedModel: the model's keys cannot be turned to other positions.
    """

    is_compileable = False

    def __init__(self, model: Any, window: int, *, keep: int | None = None):
        tower = find_decoder(model)
        acting = acting_in(tower)
        registers = acting.plan.registers if acting else 0
        if keep is None and not registers:
            raise TestregError(
                f"{type(model).__name__} has no registers that could stay: testreg.patch(model, plan) first, or "
                f"say how many tokens of the text stay: keep=4 is StreamingLLM."
            )
        longest = trained(tower)
        for name, value, least, most in (
            ("window", window, max(2, registers), longest // 2),
            ("keep", keep or 0, 0, longest // 4),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise TestregError(
                    f"{name} must be a whole number from {least} (no fewer tokens than there are registers) to {most} "
                    f"({type(tower.module).__name__} was trained on {longest} positions), not {value!r:.50}."
                )
        self.window, self.keep = window, keep or 0
        self.limit = min(longest, self.keep + SPAN * window)
        super().__init__(layers=[StreamingLayer(self, turning) for turning in turnings(tower, longest)])
        setattr(self, FILLED, acting.plan.digest if acting else None)
        self._begin()
        if not isinstance(getattr(tower.module.__dict__.get("forward"), "__self__", None), Pieces):
            tower.module.forward = Pieces(tower).forward

    def _begin(self) -> None:
        self.seen = self.at = 0  # tokens so far; the next position, where nothing is padding
        self.next = torch.zeros(0, dtype=torch.long)  # (batch,) each text's next position
        self.real = torch.zeros(0, 0, dtype=torch.bool)  # (batch, held tokens)
        self.had = self.next  # (batch,) how many of those that stay each text has had
        self.settled = not self.keep  # whether each has had all
        self.onward = self.next  # (batch,) how much further on these stand than where they were written
        self.start = 0  # from which token on layers hold what they have, after this call
        self.places: tuple[Tensor, Tensor] | None = None  # (batch, keep) which new tokens stay, and whether one does

    def enter(self, tokens: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Make room for tokens `(batch, tokens, ...)`.

        Args:
            attention_mask: `(batch, any)`, whose last columns say which of them are real.

        Returns:
            Their positions `(batch, tokens)`, and who sees whom `(batch, 1, tokens, keys)`, True = seen.
        """
        batch, count = tokens.shape[:2]
        if not self.seen:
            self.next = self.had = torch.zeros(batch, dtype=torch.long, device=tokens.device)
            self.real = torch.zeros(batch, 0, dtype=torch.bool, device=tokens.device)
        if batch != len(self.next):
            raise TestregError(f"the cache holds {len(self.next)} texts, but {batch} were given: begin with a new one.")
        if self.at + count > self.limit:
            self._turn()
        new = torch.ones(batch, count, dtype=torch.bool, device=tokens.device)
        if attention_mask is not None:
            new = attention_mask[:, -count:].to(tokens.device) > 0
        held = self.real.shape[1]
        real = torch.cat([self.real, new], dim=1)  # (batch, held + tokens)
        positions = (self.next[:, None] + new.cumsum(1) - 1).clamp(min=0)
        query = held + torch.arange(count, device=tokens.device)[:, None]
        key = torch.arange(held + count, device=tokens.device)[None]
        visible = ((key <= query) & (query - key < self.window))[None] & real[:, None]  # (batch, tokens, keys)
        first = self._first(new)
        new_first = nn.functional.pad(first, (held, 0))  # (batch, held + tokens)
        visible = visible | ((key <= query)[None] & new_first[:, None])
        visible = visible | (key == query)  # padding sees itself, since a softmax over nothing is no number
        stay = torch.arange(self.keep, device=tokens.device) < self.had[:, None]  # (batch, keep)
        visible = torch.cat([stay[:, None].expand(-1, count, -1), visible], dim=-1)
        self.onward = self.next - self.real.sum(1) - self.had
        self.next = self.next + new.sum(1)
        self.had = (self.had + new.sum(1)).clamp(max=self.keep)
        self.at += count
        self.start = max(0, held + count - (self.window - 1))
        self.real = (real & ~new_first)[:, self.start :]
        return positions, visible[:, None]

    def _first(self, new: Tensor) -> Tensor:
        """Which of the new tokens `(batch, tokens)` are among the first of their texts, and stay."""
        self.places = None
        if self.settled:
            return torch.zeros_like(new)
        count = self.had[:, None] + new.cumsum(1)
        first = new & (count <= self.keep)
        here = first[..., None] & (count[..., None] - 1 == torch.arange(self.keep, device=new.device))
        self.places = here.int().argmax(1), here.any(1)  # here is (batch, tokens, keep)
        self.settled = bool((count[:, -1] >= self.keep).all())
        return first

    def _turn(self) -> None:
        """Turn all held keys back, so that each text's oldest follows those that stay."""
        back = self.next - self.real.sum(1) - self.had  # (batch,)
        layers: Any = self.layers
        for layer in layers:
            layer.keys = layer.turning.turn(layer.keys, -back)
        self.next, self.at = self.next - back, self.keep + self.real.shape[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens there were, of which the last ones are held."""
        return self.seen

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.layers:
            layer.reset()
        self._begin()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Texts in another order, as beams are."""
        self._pick(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each text several times."""
        self._pick(lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the texts."""
        self._pick(lambda held: held[indices.to(held.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Tokens that are gone do not come back."""
        raise TestregError("a StreamingCache cannot take tokens back: assisted generation needs another cache.")

    def _pick(self, pick: Any) -> None:
        self.next, self.real, self.had = pick(self.next), pick(self.real), pick(self.had)
        for layer in self.layers:
            for name in ("keys", "values", "first_keys", "first_values"):
                held = getattr(layer, name)
                if held is not None and held.numel():
                    setattr(layer, name, pick(held))


class StreamingLayer(CacheLayerMixin):
    """One block's keys and values `(batch, heads, tokens, channels)`; `first_...` of the tokens that stay."""

    is_sliding = False
    keys: Any
    values: Any

    def __init__(self, cache: StreamingCache, turning: Turning):
        super().__init__()
        self.cache, self.turning = cache, turning
        self.first_keys: Tensor | None = None
        self.first_values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        if keep := self.cache.keep:
            self.first_keys, self.first_values = (
                states.new_zeros(*states.shape[:2], keep, states.shape[-1]) for states in (key_states, value_states)
            )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All that is held, those that stay in front, and the new ones; then what the window leaves is let go."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)
        # Clones, or a view of the window would hold the whole prompt.
        self.keys, self.values = (held[..., self.cache.start :, :].clone() for held in (keys, values))
        first_keys, first_values = self.first_keys, self.first_values
        if first_keys is None or first_values is None:
            return keys, values
        if self.cache.places:
            self.first_keys = _put(key_states, first_keys, *self.cache.places)
            self.first_values = _put(value_states, first_values, *self.cache.places)
        first_keys = self.turning.turn(first_keys, self.cache.onward)
        return torch.cat([first_keys, keys], -2), torch.cat([first_values, values], -2)

    def reset(self) -> None:
        self.keys = self.values = self.first_keys = self.first_values = None
        self.is_initialized = False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.real.shape[1] + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.seen

    def get_max_length(self) -> int:
        return -1


def _put(new: Tensor, first: Tensor, where: Tensor, there: Tensor) -> Tensor:
    """`first` `(batch, heads, some, channels)` with the tokens of `new` at `where` put in, which are `there`.

    Args:
        where, there: `(batch, some)`.
    """
    index = where[:, None, :, None].expand(-1, *first.shape[1:])
    return torch.where(there[:, None, :, None], new.gather(-2, index), first)
