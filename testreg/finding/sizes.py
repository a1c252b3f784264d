"""Other sizes of image than a model's own: does a plan hold there, and how many registers go with how many patches?

The number of registers belongs to the resolution: one stands for few outliers, and a larger image may have more. How it
grows is measured at a smaller and at a larger size, and becomes the plan's law.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import gt, lt
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..images import Batch, ImageStream, stream
from ..images.resized import resized
from ..images.takes import pixels
from ..runtime import RegisterPlan, Tower, patch
from ..runtime.errors import TestregError
from ..runtime.law import MOST_PATCHES, Law
from .choose import GONE, as_good, climb, sizes_up_to
from .detect import Artefact, rank
from .places import grid
from .scan import Kept, look, scan, stack, together
from .trial import Bench, Score

IMAGES = 8  # per size, of at most twice the patches that as many of the model's own size have,
FEWEST = 4  # but no fewer
SMALLER, LARGER = 2**-0.5, 2.0  # times the model's own side
MOST = 256  # registers


@dataclass(frozen=True)
class Size:
    """What was measured at one size.

    Attributes:
        side: height and width in pixels.
        patches: of an image.
        images: how many were looked at.
        per_image: mean number of outliers in an image.
        before: share of outlier patches at the worst block of the unpatched model.
        tried: number of registers -> what came of it.
        best: the number of least drift.
    """

    side: tuple[int, int]
    patches: int
    images: int
    per_image: float
    before: float
    tried: dict[int, Score]
    best: int

    def to_dict(self, registers: int) -> dict[str, Any]:
        """Plain JSON values, with the score of `registers`."""
        about = {"side": list(self.side), "patches": self.patches, "images": self.images}
        drifts = [[count, round(score.drift, 6)] for count, score in sorted(self.tried.items())]
        score = {} if registers not in self.tried else asdict(self.tried[registers])
        measured = {"outliers_per_image": self.per_image, "before": self.before, "best": self.best, "drifts": drifts}
        return {**about, **measured, "registers": registers, **score}


class Sizes:
    """A plan at other sizes than the one that it was found at.

    Args:
        images: as they were given to `find`; read again where that is possible.
        kept: processed images of the model's own size, that are made larger and smaller where it is not.
        held: images that nothing may be chosen on.
    """

    def __init__(
        self,
        model: nn.Module,
        tower: Tower,
        found: Artefact,
        images: ImageStream,
        kept: list[Kept],
        held: Iterable[Kept],
        batch_size: int,
        step: Callable[[], Any],
    ):
        self.model, self.tower, self.found, self.images = model, tower, found, images
        self.kept, self.apart, self.step = kept[:IMAGES], {image.digest for image in held}, step
        self.batch_size = max(1, min(batch_size, IMAGES) // 2)
        self.refused: list[dict[str, Any]] = []

    def fitted(
        self, plan: RegisterPlan, own: Bench, sides: Sequence[int] | None, more: range
    ) -> tuple[RegisterPlan, list[Any]]:
        """The plan with its law, and with neurons that leave no outlier at any size; and a row of each size.

        Args:
            own: what the plan was chosen on.
            sides: in pixels; None = the usual ones.
            more: blocks where more neurons may be, if some are needed.
        """
        image, patches = pixels(self.kept[0].inputs), self.kept[0].norms.shape[-1]
        if (sides is not None and not sides) or image.ndim != 4:
            return plan, []
        height, width = image.shape[-2:]
        wanted = usual(height, width, patches) if sides is None else [scaled(side, height, width) for side in sides]
        benches = [(side, kept, self._bench(kept)) for side in wanted if (kept := self._at(side))]
        for _, kept, bench in benches:
            plan = self._widened(plan, kept, bench, own, more)
        measured = [self._counted(plan, side, kept, bench) for side, kept, bench in benches]
        plan = replace(plan, law=law(plan.registers, patches, measured))
        for size, (_, _, bench) in zip(measured, benches, strict=True):
            count = plan.registers_for(size.patches)
            if count not in size.tried:
                size.tried[count] = bench.score(with_registers(plan, count))
        rows = [size.to_dict(plan.registers_for(size.patches)) for size in measured]
        return plan, sorted([*rows, *self.refused], key=lambda row: row["side"])

    def _bench(self, kept: list[Kept]) -> Bench:
        return Bench(self.model, self.tower, kept, self.found.threshold, self.found.block, self.batch_size)

    def _at(self, side: tuple[int, int]) -> list[Kept]:
        """A few images of that size, and what the unpatched model makes of them; none where it does not take them."""
        height, width = pixels(self.kept[0].inputs).shape[-2:]
        count = max(FEWEST, min(IMAGES, 2 * IMAGES * height * width // (side[0] * side[1])))
        try:
            _, sample = scan(self.model, self.tower, self._batches(side, count), count)
            return list(sample)
        except (TestregError, RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.refused.append({"side": list(side), "refused": reason[:200]})
            return []

    def _batches(self, side: tuple[int, int], count: int) -> Iterator[Batch]:
        height, width = pixels(self.kept[0].inputs).shape[-2:]
        processor = resized(self.images.processor, side[0] / height) if side[0] * width == side[1] * height else None
        given = self.images.source
        anew = processor is not None and not given.once
        left = count
        if anew:
            for batch in stream(given.images, processor, model=self.model, batch_size=1):
                if tuple(pixels(batch.inputs).shape[-2:]) != side:
                    break  # made by the user, or cut to a size of its own
                if batch.digests[0] in self.apart:
                    continue
                yield batch
                left -= 1
                if not left:
                    return
        if left == count:
            for image in self.kept[:count]:
                yield Batch(_scaled(image.inputs, side), (image.digest,))

    def _counted(self, plan: RegisterPlan, side: tuple[int, int], kept: list[Kept], bench: Bench) -> Size:
        counts = [int(self.found.threshold.outliers(image.norms[self.found.shown]).sum()) for image in kept]
        per_image = sum(counts) / len(counts)
        tried: dict[int, Score] = {}

        def drift(count: int) -> float:
            if count not in tried:
                tried[count] = bench.score(with_registers(plan, count))
                self.step()
            return tried[count].drift if tried[count].left <= GONE * bench.before else float("inf")

        drift(plan.registers)
        start = min(MOST, max(1, round(per_image)))
        step = max(1, round(0.15 * start))
        best = climb(start, drift, most=MOST, step=step)
        drift(round(least_between(best, step, tried)))
        best = min(tried, key=drift)
        return Size(side, kept[0].norms.shape[-1], len(kept), per_image, bench.before, tried, best)

    def _widened(self, plan: RegisterPlan, kept: list[Kept], bench: Bench, own: Bench, blocks: range) -> RegisterPlan:
        """The plan with more neurons, where it leaves outliers at a size and they are what writes these."""
        if not blocks or self._clean(plan, bench):
            return plan
        with patch(self.model, plan):
            left = [
                replace(image, norms=norms.cpu())
                for batch in together(kept, self.batch_size)
                for image, norms in zip(batch, look(self.model, self.tower, stack(batch)).norms, strict=True)
            ]
            ranking = rank(self.model, self.tower, left, self.found, self.batch_size, blocks=blocks, entries=[1])
        new = [one for one in ranking.candidates if (one.block, one.neuron) not in plan.pairs]
        for count in sizes_up_to(len(new)) if new else ():
            rest = {(one.block, one.neuron): one.ordinary for one in new[:count]}
            wider = _with_neurons(plan, rest)
            self.step()
            if self._clean(wider, bench) and self._clean(wider, own):
                return wider
        return plan

    @staticmethod
    def _clean(plan: RegisterPlan, bench: Bench) -> bool:
        return bench.score(plan).left <= GONE * bench.before


def least_between(best: int, step: int, tried: Mapping[int, Score]) -> float:
    """Where the parabola through the drifts at `best` and a step to either side is least."""
    if best - step not in tried or best + step not in tried:
        return best
    before, at, after = (tried[count].drift for count in (best - step, best, best + step))
    bend = before - 2 * at + after
    return best + step * max(-0.5, min(0.5, (before - after) / (2 * bend))) if bend > 0 else best


def usual(height: int, width: int, patches: int) -> list[tuple[int, int]]:
    """A smaller and a larger size than that of an image of `patches` patches, in whole ones."""
    patch = height // grid(height, width, patches)[0]
    sizes = [
        (patch * max(2, round(factor * height / patch)), patch * max(2, round(factor * width / patch)))
        for factor in (SMALLER, LARGER)
    ]
    return [size for size in sizes if size != (height, width)]


def scaled(side: int, height: int, width: int) -> tuple[int, int]:
    """A size whose shorter side is `side`, of the shape of `height` by `width`."""
    factor = side / min(height, width)
    return round(factor * height), round(factor * width)


def with_registers(plan: RegisterPlan, count: int) -> RegisterPlan:
    """The plan with `count` registers at every size."""
    return replace(plan, law=Law(0.0, float(count), 1, MOST_PATCHES) if count != plan.registers else None)


def law(registers: int, patches: int, sizes: list[Size]) -> Law | None:
    """Lines through the best counts, or a constant where that is as good; None where nothing was measured.

    Args:
        registers, patches: at the model's own size.
    """
    if not sizes:
        return None
    fewest, most = (end([patches, *(size.patches for size in sizes)]) for end in (min, max))
    if all(as_good(size.tried[registers].drift, size.tried[size.best].drift) for size in sizes):
        return Law(0.0, float(registers), fewest, most)
    # Two lines that meet at the model's own size, whose number is the plan's.
    smaller, larger = (
        _slope([(size.patches - patches, size.best - registers) for size in sizes if beyond(size.patches, patches)])
        for beyond in (lt, gt)
    )
    slope: float = larger if larger is not None else smaller or 0.0
    below = slope if smaller is None else smaller
    if registers - below * (patches - fewest) < 1:  # no size goes without
        below = (registers - 1) / (patches - fewest)
    bend = 0 if below == slope else patches
    return Law(slope, registers - slope * patches, fewest, most, bend, below if bend else 0.0)


def _slope(points: list[tuple[int, int]]) -> float | None:
    """Of the line through zero that is nearest to the points; None where there are none."""
    return sum(x * y for x, y in points) / sum(x * x for x, _ in points) if points else None


def _with_neurons(plan: RegisterPlan, more: Mapping[tuple[int, int], float]) -> RegisterPlan:
    """The plan with more neurons, and what each of them rests at."""
    values = [value for row in plan.rest.values() for value in row] if plan.rest else [0.0] * len(plan.pairs)
    rows: dict[int, dict[int, float]] = {}
    for (block, neuron), value in sorted({**dict(zip(plan.pairs, values, strict=True)), **more}.items()):
        rows.setdefault(block, {})[neuron] = value
    neurons = {block: tuple(row) for block, row in rows.items()}
    return replace(plan, neurons=neurons, rest={block: tuple(row.values()) for block, row in rows.items()})


def _scaled(inputs: Mapping[str, Tensor], side: tuple[int, int]) -> dict[str, Tensor]:
    image = pixels(inputs)  # (1, channels, height, width)
    scaled = interpolate(image.float(), size=side, mode="bicubic", antialias=True)
    return {**inputs, "pixel_values": scaled.to(image.dtype)}
