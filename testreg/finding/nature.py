"""What kind of artefact it is: where it sits, in how many states, what attention reads there, and what is not of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..metrics.outliers import locked
from .attending import Attending
from .closer import Glance
from .detect import NEARLY_ALL, Artefact
from .kinds import Kinds
from .scan import Kept

FEWEST = 4  # images: below, nothing can be said of places
OFTEN = 0.5  # share of the images in which a patch is an outlier, where its place makes it one
HARDLY_ANY = 0.1  # of the outliers
MOST_STATES = 4
ONE_STATE = 0.9  # mean cosine with the mean of its kind
ALIKE = 0.5  # cosine with the way from ordinary patches to outliers: an ordinary patch is on it by no chance
MANY = 0.05  # of the ordinary patches, or of their variance: worth a word
IDLE, BROADCASTING = 0.2, 0.5  # value norms over the mean, arXiv 2606.08105


@dataclass(frozen=True)
class Nature:
    """What kind of artefact a model has.

    Attributes:
        where: "position", the same patches whatever the image; "content", the image decides; "both"; or "unknown",
            where there are too few images of one size to tell.
        locked: share of the outliers that are at patches which are outliers in half of the images, 0..1.
        places: these patches.
        states: in how many directions of the residual stream they are, 1 to 4; 4 = that many, or none at all in common.
        likeness: mean cosine of an outlier with the mean of its kind.
        values: norm of what attention reads at outliers over its mean over ordinary patches, in the blocks behind;
            None where it cannot be read, or no block is behind.
        attention: share of the attention that goes to all outliers together, in the blocks behind; None likewise.
        alike: share of the patches of ordinary norm that lie the outliers' way from the other ones, 0..1.
        pattern: share of the variance of ordinary patches after the last block that their place alone explains,
            adjusted for the number of images, 0..1; None where there are too few.
    """

    where: Literal["position", "content", "both", "unknown"]
    locked: float
    places: tuple[int, ...]
    states: int
    likeness: float
    values: float | None
    attention: float | None
    alike: float
    pattern: float | None

    @property
    def sink(self) -> str:
        """What the outliers do as attention sinks, by their values: "idle", "broadcasting", "between", or "unknown"."""
        if self.values is None:
            return "unknown"
        return "idle" if self.values <= IDLE else "broadcasting" if self.values >= BROADCASTING else "between"

    @property
    def sentences(self) -> list[str]:
        """What it is, and what registers mend of it, in words."""
        few = f"{len(self.places)} patch{'es' * (len(self.places) != 1)}"
        said = {
            "position": f"Locked to places: {self.locked:.0%} of the outliers are at the same {few} in every image.",
            "content": "Set by content: other patches are outliers in every image.",
            "both": f"Of both kinds: {self.locked:.0%} of the outliers are at the same {few}, the others where "
            "the image sets them.",
            "unknown": "Too few images of one size to tell whether places or contents make the outliers.",
        }[self.where]
        lines = [said]
        if self.states == 1:
            lines.append(
                f"They are in one state (cosine with their mean {self.likeness:.2f}), which registers can hold."
            )
        elif self.likeness >= ONE_STATE:
            lines.append(f"They are in {self.states} states, so it takes registers that differ.")
        else:
            lines.append(
                f"They have no state in common (cosine {self.likeness:.2f} with the mean of the nearest of "
                f"{self.states} kinds): registers that receive the neurons' maxima may fit better than constant ones."
            )
        if self.attention is not None:
            lines.append(f"{self.attention:.0%} of the attention behind them goes there.")
        if self.values is not None:
            does = {
                "idle": "they take attention and give nothing, as registers will",
                "broadcasting": "they tell all other patches something, which the registers go on telling",
                "between": "between giving nothing (0.2) and telling all others something (0.5)",
            }[self.sink]
            lines.append(f"What is read there has {self.values:.2f} times the usual norm: {does}.")
        lines.append("Registers mend the outliers, and the maps and features that these spoil.")
        if self.alike >= MANY:
            lines.append(
                f"They do not mend patches that are spoilt at ordinary norm: {self.alike:.0%} of the others lie the "
                f"outliers' way."
            )
        if self.pattern is not None and self.pattern >= MANY:
            lines.append(
                f"They do not change what a patch's place alone makes of it, {self.pattern:.0%} of the variance after "
                f"the last block."
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the sentences."""
        return {**asdict(self), "places": list(self.places), "sink": self.sink, "sentences": self.sentences}


def nature(images: list[Kept], looks: list[Glance], found: Artefact, seen: Attending | None) -> Nature | None:
    """What kind of artefact `found` is; None where none of the images happens to show it.

    Args:
        images: kept images, to tell places by.
        looks: at some of them.
        seen: where attention goes.
    """
    outliers = [found.threshold.outliers(image.norms[found.shown]) for image in images]
    share, places = locked(outliers, OFTEN) if len(outliers) >= FEWEST else (None, ())
    where: Any = "unknown"
    if share is not None:
        where = "position" if share >= NEARLY_ALL else "content" if share <= HARDLY_ANY else "both"
    spoilt = [(glance.state, glance) for glance in looks if glance.state is not None]
    if not spoilt:
        return None
    picked = torch.cat([state[glance.outliers] for state, glance in spoilt])  # (outliers, channels)
    others = torch.cat([state[~glance.outliers] for state, glance in spoilt])  # (others, channels)
    ratios = [
        float(norms[glance.outliers].mean() / norms[~glance.outliers].mean())
        for glance in looks
        for norms in glance.values
    ]
    kinds, likeness = _kinds(picked)
    middle = others.mean(0)
    along = cosine_similarity(others - middle, (picked.mean(0) - middle)[None])  # (others,)
    return Nature(
        where=where,
        locked=share or 0.0,
        places=places,
        states=kinds,
        likeness=likeness,
        values=sum(ratios) / len(ratios) if ratios else None,
        attention=seen.outliers if seen and found.block + 1 < len(images[0].norms) else None,
        alike=float((along > ALIKE).float().mean()),
        pattern=_pattern(images, outliers),
    )


def _kinds(states: Tensor) -> tuple[int, float]:
    """In how few directions states `(outliers, channels)` lie, and how near they are to them."""
    likeness = 0.0
    for count in range(1, MOST_STATES + 1):
        kinds = Kinds(states, count)
        means = torch.stack([states[kinds.kind == kind].mean(0) for kind in range(len(kinds.sizes))])
        likeness = float(cosine_similarity(states, means[kinds.kind]).mean())
        if likeness >= ONE_STATE:
            return len(kinds.sizes), likeness
    return MOST_STATES, likeness


def _pattern(images: list[Kept], outliers: list[Tensor]) -> float | None:
    """Of what ordinary patches are after the last block, the share of the variance that their place explains."""
    features = [image.features for image in images]
    if len(features) < FEWEST or len({row.shape for row in features}) != 1:
        return None
    kept = torch.stack(features).double()  # (images, some patches, channels)
    step = -(-len(outliers[0]) // kept.shape[1])
    ordinary = (~torch.stack(outliers)[:, ::step]).double()[..., None]  # (images, some patches, 1)
    count = ordinary.sum(0)  # (some patches, 1)
    means = (kept * ordinary).sum(0) / count.clamp(min=1)
    within = ((kept - means).square() * ordinary).sum() / (count.sum() - (count > 0).sum()).clamp(min=1)
    middle = (kept * ordinary).sum((0, 1)) / count.sum()
    total = ((kept - middle).square() * ordinary).sum() / (count.sum() - 1)
    return float((1 - within / total).clamp(min=0))
