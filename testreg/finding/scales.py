"""What one scale per tensor would have to hold: the cost of quantising a model, before anybody does it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ..runtime.towers import Tower
from .linears import Linears, linears
from .observe import run
from .scan import Kept

WASTED = 8.0  # times the typical: three of eight bits
ADAPTER = "lora_"  # in the name of a linear that peft adds


@dataclass(frozen=True)
class Scale:
    """The linear of a block whose input is hardest to quantise.

    Attributes:
        linear: what it is called in its block.
        largest: magnitude in its input.
        typical: median over tokens of a token's largest magnitude.
    """

    block: int
    linear: str
    largest: float
    typical: float

    @property
    def times(self) -> float:
        """The largest over the typical: what a scale per tensor wastes on all tokens but a few."""
        return self.largest / max(self.typical, 1e-9)


class _Sizes(Linears):
    """Each token's largest magnitude in front of every linear of the blocks, `(tokens,)` for each pass."""

    def __init__(self, tower: Tower):
        super().__init__(nn.Identity())
        self.places: dict[str, tuple[int, str]] = {}
        for block, module in enumerate(tower.blocks):
            for name, weight, _ in linears(module):
                if ADAPTER in name:  # merged before anybody quantises
                    continue
                self.names[id(weight)] = f"{block}.{name}"
                self.places[f"{block}.{name}"] = block, name
        self.seen: dict[str, list[Tensor]] = {}

    def meet(self, name: str, tokens: Tensor | None, weight: Tensor) -> tuple[Tensor | None, Tensor]:
        if tokens is not None:
            self.seen.setdefault(name, []).append(tokens.abs().amax(-1).flatten().float())
        return tokens, weight


def scales(model: nn.Module, tower: Tower, images: Iterable[Kept]) -> tuple[Scale, ...]:
    """Of each block the linear whose input has the largest value over its typical one; none where none was met."""
    with _Sizes(tower) as sizes:
        for image in images:
            run(model, image.inputs)
    worst: dict[int, Scale] = {}
    for name, seen in sizes.seen.items():
        block, linear = sizes.places[name]
        typical = sum(float(tokens.median()) for tokens in seen) / len(seen)
        found = Scale(block, linear, max(float(tokens.max()) for tokens in seen), typical)
        if block not in worst or found.times > worst[block].times:
            worst[block] = found
    return tuple(worst[block] for block in sorted(worst))


def cost(found: Iterable[Scale]) -> str:
    """A sentence about what quantising would cost; "" where no tensor wastes its scale."""
    wasted = sorted((scale for scale in found if scale.times >= WASTED), key=lambda scale: -scale.times)
    if not wasted:
        return ""
    named = ", ".join(f"{scale.linear} of block {scale.block} ({scale.times:.0f} times)" for scale in wasted[:3])
    return (
        f" In 8 bits with one scale per tensor, {len(wasted)} of the blocks would waste it on a few tokens: the "
        f"largest value over the typical one is greatest in front of {named}{', ...' if len(wasted) > 3 else ''}."
    )
