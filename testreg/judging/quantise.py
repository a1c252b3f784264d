"""Quantisation, simulated: every linear computes with the values that a few bits can hold.

Rounding is by torch's own fake-quantise operators, ranges are those of calibration images. Everything between the
linears stays in float, as in the usual int8 of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..finding.linears import Linears, linears
from ..finding.observe import run
from ..runtime.errors import TestregError

FP8 = getattr(torch, "float8_e4m3fn", None)
SMALLEST = 1e-12  # a scale; a tensor of zeros has one too


@dataclass(frozen=True)
class Scheme:
    """How many bits, and how many values share a scale.

    Attributes:
        weights, activations: bits, 2 to 8; 16 = as they are; "fp8" = float8 e4m3.
        per_channel: one scale for each output channel of a weight; otherwise one for each weight. Symmetric.
        per_token: one range for each token, taken as it comes (dynamic); otherwise one for each linear's input, from
            calibration images (static). With a zero point.
        clip: static ranges end where this share of an image's values lies inside, 0.5..1; None = at the extremes.
    """

    weights: int | str
    activations: int | str
    per_channel: bool = False
    per_token: bool = False
    clip: float | None = None

    def __post_init__(self) -> None:
        for name, bits in (("weights", self.weights), ("activations", self.activations)):
            if bits == "fp8" and FP8 is None:
                raise TestregError("this torch has no float8: pip install -U torch, or take w8a8.")
            if bits not in ("fp8", 16, *range(2, 9)):
                raise TestregError(f"{name} have {bits!r} bits; 2 to 8 can be simulated, 16 change nothing, or fp8.")
        if self.clip is not None and not 0.5 < self.clip <= 1:
            raise TestregError(f"clip is {self.clip}; it is the share of values that stay, as in 0.9999.")

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
        return f"{bits}{' per channel' * self.per_channel}{' per token' * self.per_token}{kept}"


def weight_of(weight: Tensor, scheme: Scheme, axis: int = 0) -> Tensor:
    """A weight as `scheme` holds it; `axis` is that of its output channels."""
    if scheme.weights == 16:
        return weight
    largest = weight.abs().amax(1 - axis) if scheme.per_channel else weight.abs().amax()  # (channels,) or ()
    if scheme.weights == "fp8":
        return _fp8(weight, largest.unsqueeze(1 - axis) if scheme.per_channel else largest)
    end = 2 ** (int(scheme.weights) - 1) - 1
    scale = (largest.float() / end).clamp(min=SMALLEST)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    if scheme.per_channel:
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, axis, -end, end)
    return torch.fake_quantize_per_tensor_affine(weight, scale, zero, -end, end)


def activation_of(tokens: Tensor, scheme: Scheme, low: Tensor, high: Tensor) -> Tensor:
    """A linear's input `(..., channels)` as `scheme` holds it.

    Args:
        low, high: ends of the range, `()` for all tokens together or `(tokens,)`, one for each.
    """
    if scheme.activations == "fp8":
        largest = torch.maximum(-low, high)
        return _fp8(tokens, largest.view(*tokens.shape[:-1], 1) if largest.ndim else largest)
    end = 2 ** int(scheme.activations) - 1
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)  # zero is always among the values
    scale = ((high - low) / end).clamp(min=SMALLEST)
    zero = (-low / scale).round().clamp(0, end).to(torch.int32)
    if not low.ndim:
        return torch.fake_quantize_per_tensor_affine(tokens, scale, zero, 0, end)
    rows = tokens.flatten(0, -2)  # (tokens, channels)
    return torch.fake_quantize_per_channel_affine(rows, scale, zero, 0, 0, end).view_as(tokens)


def _fp8(values: Tensor, largest: Tensor) -> Tensor:
    assert FP8 is not None
    end = torch.finfo(FP8).max
    scale = (largest / end).clamp(min=SMALLEST)
    return (values / scale).clamp(-end, end).to(FP8).to(values.dtype) * scale


class Ranges(Linears):
    """Ends of what reaches each linear in the forward passes inside the `with`, by its name."""

    def __init__(self, model: nn.Module, clip: float | None = None):
        super().__init__(model)
        self.clip = clip
        self.ends: dict[str, list[Tensor]] = {}  # low, high and how many images these are of

    def meet(self, name: str, tokens: Tensor | None, weight: Tensor) -> tuple[Tensor | None, Tensor]:
        for image in () if tokens is None else tokens:
            self._add(name, image.flatten().float())
        return tokens, weight

    def _add(self, name: str, values: Tensor) -> None:
        if self.clip is None:
            low, high, seen = self.ends.get(name, [values[0], values[0], values.new_zeros(())])
            self.ends[name] = [torch.minimum(low, values.amin()), torch.maximum(high, values.amax()), seen + 1]
            return
        outside = max(1, int((1 - self.clip) / 2 * len(values)) + 1)  # at either end
        ends = -(-values).topk(outside).values[-1], values.topk(outside).values[-1]
        low, high, seen = self.ends.get(name, [values.new_zeros(())] * 3)
        self.ends[name] = [
            low + (ends[0] - low) / (seen + 1),
            high + (ends[1] - high) / (seen + 1),
            seen + 1,
        ]  # means over images


class Quantised(Linears):
    """Inside the `with`, every linear of `model` computes as `scheme` says; the model itself stays as it is.

    Args:
        ends: static ranges by the linears' names, as `Ranges` gives them.
    """

    def __init__(self, model: nn.Module, scheme: Scheme, ends: Mapping[str, list[Tensor]] | None = None):
        super().__init__(model)
        self.scheme, self.ends = scheme, dict(ends or {})
        self.axes = {name: axis for name, _, axis in linears(model)}
        self.weights: dict[str, Tensor] = {}

    def meet(self, name: str, tokens: Tensor | None, weight: Tensor) -> tuple[Tensor | None, Tensor]:
        if name not in self.weights:
            self.weights[name] = weight_of(weight.detach(), self.scheme, self.axes[name])
        if tokens is None or self.scheme.activations == 16:
            return tokens, self.weights[name]
        if self.scheme.per_token:
            rows = tokens.flatten(0, -2)  # (tokens, channels)
            return activation_of(tokens, self.scheme, rows.amin(1), rows.amax(1)), self.weights[name]
        if name not in self.ends:
            raise TestregError(f"{name} was not met on the calibration images, so it has no range.")
        low, high, _ = self.ends[name]
        return activation_of(tokens, self.scheme, low, high), self.weights[name]


def quantised(model: nn.Module, scheme: Scheme, batches: Iterable[Mapping[str, Tensor]] = ()) -> Quantised:
    """`model`, patched or not, as it is now, calibrated on `batches` of its inputs.

    Raises:
        TestregError: the scheme is static, and none of the model's linears was met on any batch.
    """
    if not scheme.static:
        return Quantised(model, scheme)
    with Ranges(model, scheme.clip) as ranges:
        for batch in batches:
            run(model, batch, whole=True)
    if not ranges.ends:
        raise TestregError(f"{scheme} needs calibration images: pass some, or choose ranges per token.")
    return Quantised(model, scheme, ranges.ends)


def unclipped(scheme: Scheme) -> Scheme:
    """The same with ranges that end at the extremes."""
    return replace(scheme, clip=None)
