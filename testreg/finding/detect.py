"""Which patches are outliers, and which neurons write them: decided by the images, with nothing to set."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..metrics.outliers import BlockNorms, locked
from ..runtime.errors import BadPlan, UnsupportedModel
from ..runtime.offload import present
from ..runtime.paths import reach
from ..runtime.plan import RegisterPlan
from ..runtime.towers import Tower
from .columns import columns
from .observe import run
from .scan import Kept, Norms, bin_of, outputs, stack, together, value
from .trial import Enough, Threshold

LEAST, MOST = 2.0, 8.0  # times the median norm: between these, the emptiest place parts outliers from other patches
APART = 1.5  # times the median norm: below, a patch is an outlier by no threshold
STRONG = 3.0  # times the median norm: an artefact's outliers reach this
COMMON = 0.05  # share of images that have an outlier where there is an artefact
NEARLY_ALL = 0.9  # of the images, and of the outliers
SELECTIVE = 3.0  # times its root mean square over ordinary patches: a register neuron's contrast is above that
FAINT = 1e-3  # of the best neuron's score: nothing below is worth a trial
SCALES = ("layer_scale2.lambda1", "ls2.gamma", "ls_2.gamma", "lambda_2", "gamma_2", "ls2")


@dataclass(frozen=True)
class Artefact:
    """Where the outliers are.

    Attributes:
        threshold: from which norm on a patch is one.
        block: at whose output they first appear.
        shown: the block whose output shows them best.
        share: of patches that are outliers there, 0..1.
        images: share of images with one there, 0..1.
    """

    threshold: Threshold
    block: int
    shown: int
    share: float
    images: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), **asdict(self.threshold), "threshold": str(self.threshold)}


def artefact(norms: Norms, threshold: Threshold) -> Artefact | None:
    """Where patches lie above `threshold`; None where they do not, in one image of twenty at least."""
    share, images = shares(norms, threshold)
    largest = largest_ratio(norms)
    real = images >= COMMON
    if not threshold.norm:
        real &= largest > STRONG
    share = share.where(real, 0.0)
    if not share.any():
        return None
    # Among the blocks with the most outliers, the one where they stand out most.
    shown = int(largest.where(share >= 0.9 * share.max(), 0.0).argmax())
    block = shown
    while block and share[block - 1] >= 0.5 * share[shown]:
        block -= 1
    return Artefact(threshold, block, shown, float(share[shown]), float(images[shown]))


def shares(norms: Norms, threshold: Threshold) -> tuple[Tensor, Tensor]:
    """Share of outlier patches, and of images with one, at the output of every block `(blocks,)`."""
    share, images = norms.ratios.above(threshold.times), norms.peaks.above(threshold.times)
    if threshold.norm:
        share = share.minimum(norms.norms.above(threshold.norm))
        images = images.minimum(norms.highest.above(threshold.norm))
    return share, images


def table(norms: Norms, threshold: Threshold) -> tuple[BlockNorms, ...]:
    """One row of numbers per block."""
    columns = (norms.norms.quantile(0.5), norms.norms.quantile(0.99), norms.largest, *shares(norms, threshold))
    return tuple(BlockNorms(*row) for row in zip(*(column.tolist() for column in columns), strict=True))


def largest_ratio(norms: Norms) -> Tensor:
    """The largest norm over the median norm of its image, per block `(blocks,)`."""
    return norms.peaks.quantile(1.0)


def valley(norms: Norms) -> Threshold:
    """Where outliers part from other patches, by the distribution of norms.

    A norm's ratio to the median of its image has a second mode where there is an artefact. The two part at the emptiest
    place between 2 and 8 times the median, at the block where some patch stands out most.
    """
    low, high = bin_of(LEAST), bin_of(MOST)
    counts = norms.ratios.counts[int(largest_ratio(norms).argmax()), low:high].float()
    window = (high - low) // 8  # a quarter octave
    smooth = counts.unfold(0, window, 1).mean(1)
    emptiest, lengths = torch.unique_consecutive(smooth == smooth.min(), return_counts=True)
    widest = int((lengths * emptiest).argmax())
    middle = lengths[:widest].sum() + lengths[widest] / 2 + window / 2
    return Threshold(times=float(value(low + middle)))


def check_threshold(norm: Any) -> None:
    """Whether what a user set as threshold can be one.

    Raises:
        BadPlan: it cannot.
    """
    if norm is None or isinstance(norm, Threshold):
        return
    if not (isinstance(norm, (int, float)) and 0 < norm < float("inf")):
        raise BadPlan(f"threshold must be a norm above 0, in the units of the residual stream, not {norm!r}.")


def chosen(norms: Norms, wanted: float | Threshold | None) -> Threshold:
    """A threshold at a norm that a user set, at blocks where such patches stand out at all; by default the valley."""
    if isinstance(wanted, Threshold):
        return wanted
    return valley(norms) if wanted is None else Threshold(APART, float(wanted))


def threshold_of(plan: RegisterPlan) -> Threshold | None:
    """What an outlier was when a plan was found; None where its provenance does not say."""
    found = plan.provenance.get("artefact")
    times, norm = (found.get(name) for name in ("times", "norm")) if isinstance(found, Mapping) else (None, None)
    if not isinstance(times, float) or not isinstance(norm, float):
        return None
    return Threshold(times, norm) if APART <= times <= MOST and 0 <= norm < float("inf") else None


@dataclass(frozen=True)
class Candidate:
    """A neuron that may be a register neuron; activations are means over patches.

    Attributes:
        score: how far it moves outliers away from ordinary patches: the contrast of its activation times its output,
            as the block adds it to the residual stream, along the difference between the two.
        outliers, ordinary: its activation at outliers and at ordinary patches.
        spread: standard deviation of its activation over ordinary patches.
    """

    block: int
    neuron: int
    score: float
    outliers: float
    ordinary: float
    spread: float


@dataclass(frozen=True)
class Ranking:
    """What a closer look found.

    Attributes:
        candidates: best first.
        states: block -> its input at the outliers `(outliers, channels)`, for blocks around the first with outliers.
        rows: block -> its attention's input at the outliers `(outliers, channels)`, from the first of these blocks on.
        per_image: mean number of outliers in images that have any.
        positions: the patches that are outliers in nearly every image, where nearly all outliers are there; else empty.
    """

    candidates: tuple[Candidate, ...]
    states: dict[int, Tensor]
    rows: dict[int, Tensor]
    per_image: float
    positions: tuple[int, ...]


def rank(
    model: nn.Module,
    tower: Tower,
    images: list[Kept],
    found: Artefact,
    batch_size: int,
    *,
    blocks: Collection[int],
    entries: Collection[int],
    rows: bool = False,
    by_activation: bool = False,
) -> Ranking:
    """Rank neurons by what they contribute to the outliers.

    The model runs as it is, patched or not, and only as far as needed.

    Args:
        images: kept images, whose norms tell the outliers.
        blocks: where register neurons may be.
        entries: blocks whose input at the outliers is wanted.
        rows: what attention is given at the outliers is wanted too, in these blocks and all behind them.
        by_activation: score neurons by their mean activation at outliers alone, as in arXiv 2506.08010, section 4.1.
    """
    sums, streams = ({block: _Sums() for block in blocks} for _ in range(2))
    states: dict[int, list[Tensor]] = {entry: [] for entry in entries if entry}
    given: dict[int, list[Tensor]] = {block: [] for block in (range(min(entries), len(tower.blocks)) if rows else ())}
    last = max([*blocks, *(entry - 1 for entry in states), *given])
    for batch in together(images, batch_size):
        outliers = torch.stack([found.threshold.outliers(image.norms[found.shown]) for image in batch])

        def read(index: int, tokens: Tensor, outliers: Tensor = outliers) -> None:
            patches = tokens[:, -outliers.shape[1] :]  # (images, patches, channels)
            if index in streams:
                streams[index].add(patches, outliers)
            if index + 1 in states:
                states[index + 1].append(patches[outliers.to(patches.device)].float().cpu())
            if index == last:
                raise Enough

        def activations(index: int, outliers: Tensor = outliers) -> Any:
            return lambda module, args: sums[index].add(tower.batched(args[0])[:, -outliers.shape[1] :], outliers)

        def into_attention(index: int, outliers: Tensor = outliers) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                patches = tower.batched(args or tuple(kwargs.values()))[:, -outliers.shape[1] :]
                given[index].append(patches[outliers.to(patches.device)].float().cpu())

            return hook

        handles = [tower.downs[index].register_forward_pre_hook(activations(index)) for index in blocks]
        for index in given:
            handles.append(tower.attentions[index].register_forward_pre_hook(into_attention(index), with_kwargs=True))
        try:
            with outputs(tower, read), suppress(Enough):
                run(model, stack(batch))
        finally:
            for handle in handles:
                handle.remove()
    candidates = []
    for block in blocks:
        if not sums[block].outliers + sums[block].ordinary:
            reason = "never called as a module: a fused kernel reads its weights. Switch the fusion off"
            raise UnsupportedModel(f"the second linear of block {block} is {reason}.")
        candidates += _candidates(tower, block, sums[block], streams[block], by_activation)
    best = max((candidate.score for candidate in candidates), default=0.0)
    chosen = sorted(
        (candidate for candidate in candidates if candidate.score > (0 if by_activation else FAINT * best)),
        key=lambda candidate: (-candidate.score, candidate.block, candidate.neuron),
    )
    spoilt = [found.threshold.outliers(image.norms[found.shown]) for image in images]
    counts = [int(row.sum()) for row in spoilt]
    per_image = sum(counts) / max(1, sum(count > 0 for count in counts))
    joined, in_attention = (
        {block: torch.cat(parts) for block, parts in kept.items() if parts} for kept in (states, given)
    )
    share, often = locked(spoilt, NEARLY_ALL)
    positions = often if share is not None and share >= NEARLY_ALL else ()
    return Ranking(tuple(chosen), joined, in_attention, per_image, positions)


class _Sums:
    """Sums over outlier and over ordinary patches, in double precision."""

    def __init__(self) -> None:
        self.outliers, self.ordinary, self.squares = 0, 0, torch.zeros(())
        self.at_outliers, self.at_ordinary = torch.zeros(()), torch.zeros(())
        self.like = torch.zeros(0)

    def add(self, values: Tensor, outliers: Tensor) -> None:
        """Add values `(images, patches, any)` of patches, of which `outliers` `(images, patches)` are outliers."""
        self.like = values.new_zeros(0)
        picked = values[outliers.to(values.device)].double().cpu()  # (outliers, any)
        self.outliers += len(picked)
        self.ordinary += outliers.numel() - len(picked)
        self.at_outliers = self.at_outliers + picked.sum(0)
        self.at_ordinary = self.at_ordinary + values.sum((0, 1), dtype=torch.float32).double().cpu() - picked.sum(0)
        squares = values.float().square().sum((0, 1)).double().cpu()
        self.squares = self.squares + squares - picked.square().sum(0)

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean over outliers, mean and standard deviation over ordinary patches, each `(any,)`."""
        ordinary = self.at_ordinary / max(1, self.ordinary)
        spread = (self.squares / max(1, self.ordinary) - ordinary.square()).clamp(min=0).sqrt()
        return self.at_outliers / max(1, self.outliers), ordinary, spread


def _candidates(tower: Tower, block: int, sums: _Sums, stream: _Sums, by_activation: bool) -> list[Candidate]:
    outliers, ordinary, spread = sums.means()  # (neurons,)
    at_outliers, at_ordinary, _ = stream.means()  # (channels,)
    away = torch.nn.functional.normalize(at_outliers - at_ordinary, dim=0)
    with present(tower.blocks[block]):
        scale = reach(tower.blocks[block], SCALES)  # what multiplies the MLP's output
        if isinstance(scale, Tensor):
            away = away * scale.detach().double().cpu()
        weight = columns(tower.downs[block], tower.neurons[block], sums.like)  # (channels, neurons)
    contrast = outliers - ordinary
    scores = outliers if by_activation else contrast * (away @ weight)
    selective = contrast.square() > SELECTIVE**2 * (ordinary.square() + spread.square())
    wanted = (scores > 0) & (selective | by_activation)
    return [
        Candidate(block, neuron, *(float(part[neuron]) for part in (scores, outliers, ordinary, spread)))
        for neuron in wanted.nonzero().flatten().tolist()
    ]
