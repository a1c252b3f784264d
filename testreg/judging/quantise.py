"""Quantisation, simulated: every linear computes with the values that a few bits can hold.

Rounding is by torch's own fake-quantise operators, ranges are those of calibration images. Everything between the
linears stays in float, as in the usual int8 of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..finding.evening import ROWS, Even, Seen, even
from ..finding.linears import Linears, linears, normed
from ..finding.rounding import SMALLEST, rounded, rounded_weight
from ..runtime.errors import TestregError
from .asking import ask

FP8 = getattr(torch, "float8_e4m3fn", None)


@dataclass(frozen=True)
class Scheme:
    """How many bits, and how many values share a scale.

    Attributes:
        weights, activations: bits, 2 to 8; 16 = as they are; "fp8" = float8 e4m3.
        per_channel: one scale for each output channel of a weight; otherwise one for each weight. Symmetric.
        per_token: one range for each token, taken as it comes (dynamic); otherwise one for each linear's input, from
            calibration images (static). With a zero point.
        clip: static ranges end where this share of an image's values lies inside, 0.5..1; None = at the extremes.
        even: static ranges are of channels and tokens that were given sizes that one scale can hold, in the way of
            `testreg.export.export_int8` (see `testreg.finding.evening`); here for each linear by itself, and with
            ranges of divided tokens from a few of them.
    """

    weights: int | str
    activations: int | str
    per_channel: bool = False
    per_token: bool = False
    clip: float | None = None
    even: bool = False

    def __post_init__(self) -> None:
        for name, bits in (("weights", self.weights), ("activations", self.activations)):
            if bits == "fp8" and FP8 is None:
                raise TestregError("this torch has no float8: pip install -U torch, or take w8a8.")
            if bits not in ("fp8", 16, *range(2, 9)):
                raise TestregError(f"{name} have {bits!r} bits; 2 to 8 can be simulated, 16 change nothing, or fp8.")
        if self.clip is not None and not 0.5 < self.clip <= 1:
            raise TestregError(f"clip is {self.clip}; it is the share of values that stay, as in 0.9999.")
        if self.even and (self.clip is not None or not self.static):
            raise TestregError(
                "even is for static ranges of activations that end at the extremes: leave out clip and per_token, and "
                "give activations 8 bits or fewer."
            )

    @classmethod
    def parse(cls, text: str, **settings: Any) -> Scheme:
        """`"w8a8"`, `"w4a8"`, `"w4a16"` (weights alone) or `"fp8"`.

        Raises:
            TestregError: it is none of these.
        """
        if text == "fp8":
            return cls("fp8", "fp8", **settings)
        if (found := re.fullmatch(r"w(\d+)a(\d+)", text)) is None:
            raise TestregError(f"{text!r} is no way to quantise: w8a8 has 8 bits for weights and activations; or fp8.")
        return cls(int(found[1]), int(found[2]), **settings)

    @property
    def static(self) -> bool:
        """Whether it needs calibration images."""
        return self.activations != 16 and not self.per_token

    def __str__(self) -> str:
        bits = "fp8" if self.weights == self.activations == "fp8" else f"w{self.weights}a{self.activations}"
        kept = f", clipped at {100 * self.clip:g} %" if self.clip and self.static else ""
        return f"{bits}{' per channel' * self.per_channel}{' evened' * self.even}{' per token' * self.per_token}{kept}"


def weight_of(weight: Tensor, scheme: Scheme, axis: int = 0) -> Tensor:
    """A weight as `scheme` holds it; `axis` is that of its output channels."""
    if scheme.weights == 16:
        return weight
    if scheme.weights == "fp8":
        return _fp8(weight, weight.abs().amax(1 - axis, keepdim=True) if scheme.per_channel else weight.abs().amax())
    return rounded_weight(weight, int(scheme.weights), axis if scheme.per_channel else None)


def activation_of(tokens: Tensor, scheme: Scheme, low: Tensor, high: Tensor) -> Tensor:
    """A linear's input `(..., channels)` as `scheme` holds it.

    Args:
        low, high: ends of the range, `()` for all tokens together or `(tokens,)`, one for each.
    """
    if scheme.activations == "fp8":
        largest = torch.maximum(-low, high)
        return _fp8(tokens, largest.view(*tokens.shape[:-1], 1) if largest.ndim else largest)
    return rounded(tokens, low, high, int(scheme.activations))


def _fp8(values: Tensor, largest: Tensor) -> Tensor:
    assert FP8 is not None
    end = torch.finfo(FP8).max
    scale = (largest / end).clamp(min=SMALLEST)
    return (values / scale).clamp(-end, end).to(FP8).to(values.dtype) * scale


class Ranges(Linears):
    """Ends of what reaches each linear in the forward passes inside the `with`, by its name.

    Attributes:
        seen: ends of every channel, and a few tokens where they are to be evened out.
        ends: clipped, lows and highs of all channels together `()`, means over images.
        images: how many each is of.

    Args:
        clip, even: see `Scheme`.
    """

    def __init__(self, model: nn.Module, clip: float | None = None, even: bool = False):
        super().__init__(model)
        self.clip, self.kept = clip, ROWS if even else 0
        self.seen: dict[str, Seen] = {}
        self.ends: dict[str, tuple[Tensor, Tensor]] = {}
        self.images: dict[str, int] = {}

    def meet(self, name: str, tokens: Tensor | None, weight: Tensor) -> tuple[Tensor | None, Tensor]:
        self.images.setdefault(name, 0)
        if tokens is not None:
            for image in tokens if tokens.ndim > 2 else [tokens]:  # (tokens, channels)
                if self.clip is None:
                    self.seen.setdefault(name, Seen(self.kept)).add(image.float())
                else:
                    self._clip(name, image.float(), self.clip)
                self.images[name] += 1
        return tokens, weight

    def range(self, name: str) -> tuple[Tensor, Tensor]:
        """Low and high end of what reaches a linear, each `()`."""
        return self.ends[name] if self.clip is not None else (self.seen[name].low.amin(), self.seen[name].high.amax())

    def _clip(self, name: str, values: Tensor, share: float) -> None:
        outside = int((1 - share) / 2 * values.numel()) + 1  # at either end
        low, high = -(-values).flatten().topk(outside).values[-1], values.flatten().topk(outside).values[-1]
        old, count = self.ends.get(name, (low, high)), self.images[name] + 1
        self.ends[name] = old[0] + (low - old[0]) / count, old[1] + (high - old[1]) / count


class Quantised(Linears):
    """Inside the `with`, linears of `model` compute as `scheme` says; the model itself stays as it is.

    Args:
        ranges: as calibration images had them. Linears that these did not meet, those of a text tower for instance,
            stay in float.
    """

    def __init__(self, model: nn.Module, scheme: Scheme, ranges: Ranges):
        super().__init__(model)
        self.scheme, self.ranges = scheme, ranges
        self.axes = {name: axis for name, _, axis in linears(model)}
        self.weights: dict[str, Tensor] = {}
        self.evened: dict[str, Even] = {}

    def meet(self, name: str, tokens: Tensor | None, weight: Tensor) -> tuple[Tensor | None, Tensor]:
        if name not in self.ranges.images:
            return tokens, weight
        evened = self._even(name, tokens, weight) if self.scheme.even and tokens is not None else None
        if name not in self.weights:
            whole, axis = weight.detach(), self.axes[name]
            if evened is not None:
                whole = whole * (evened.scale if axis == 0 else evened.scale[:, None])
            self.weights[name] = weight_of(whole, self.scheme, axis)
        weight = self.weights[name]
        if tokens is None or self.scheme.activations == 16:
            return tokens, weight
        if evened is not None:
            tokens, size = evened(tokens)
            return activation_of(tokens, self.scheme, evened.low, evened.high) * size, weight
        if self.scheme.per_token:
            rows = tokens.flatten(0, -2)  # (tokens, channels)
            return activation_of(tokens, self.scheme, rows.amin(1), rows.amax(1)), weight
        return activation_of(tokens, self.scheme, *self.ranges.range(name)), weight

    def _even(self, name: str, tokens: Tensor, weight: Tensor) -> Even:
        if name not in self.evened:
            self.evened[name] = even(
                self.ranges.seen[name],
                weight.detach() if self.axes[name] == 0 else weight.detach().mT,
                lambda tokens, low, high: activation_of(tokens, self.scheme, low, high),
                lambda weight: weight_of(weight, self.scheme),
                divide=tokens.ndim > 2 and not normed(tokens),
            )
        return self.evened[name]


def quantised(
    model: nn.Module, scheme: Scheme, batches: Iterable[Mapping[str, Tensor]], ask: Callable[..., Any] = ask
) -> Quantised:
    """`model`, patched or not, as it is now, calibrated on `batches` of its inputs.

    Args:
        ask: runs the model on a batch.

    Raises:
        TestregError: no linear of the model was met on any batch.
    """
    with Ranges(model, scheme.clip, scheme.even) as ranges:
        for batch in batches:
            ask(model, batch)
            if not scheme.static:
                break  # one batch tells which linears there are
    if not ranges.images:
        raise TestregError(
            f"{scheme} found no linear of {type(model).__name__} to quantise: its linears are of a class of their own, "
            f"or quantised already; give the model in float, and some calibration images."
        )
    return Quantised(model, scheme, ranges)
