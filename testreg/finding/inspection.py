"""`inspect`: has a model the artefact, and where?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, overload

from torch import nn

from ..metrics.outliers import BlockNorms
from ..runtime.towers import find_tower
from . import language
from .attending import Attending, attending, native
from .closer import FEW, glances
from .count import Counted
from .detect import Artefact, artefact, check_threshold, chosen, largest_ratio, table
from .nature import Nature, nature
from .scales import Scale, cost, scales
from .survey import Running, Survey, spelled_out
from .text_inspection import TextInspection
from .trial import Threshold

if TYPE_CHECKING:
    from typing_extensions import Unpack

KEPT = 16  # images that tell what kind of artefact it is


@dataclass(frozen=True)
class Inspection:
    """Patch norms of a model, block by block.

    Attributes:
        blocks: one row per block, of its output.
        ratios: the largest norm over the median norm of its image, per block.
        threshold: from which norm on a patch counts as an outlier.
        artefact: where outliers are; None where there is no artefact.
        images: how many were looked at.
        family: of the vision tower.
        native: how many registers it was trained with.
        attention: where its attention goes; None where it gives no maps.
        nature: what kind of artefact it is; None where there is none, or none of the images that were kept shows it.
        scales: of each block the linear whose input is hardest to quantise with one scale.
    """

    blocks: tuple[BlockNorms, ...]
    ratios: tuple[float, ...]
    threshold: Threshold
    artefact: Artefact | None
    images: int
    family: str
    native: int
    attention: Attending | None
    nature: Nature | None = None
    scales: tuple[Scale, ...] = ()

    @property
    def verdict(self) -> str:
        """One sentence."""
        own = ""
        if self.native:
            share = f", which get {self.attention.native:.0%} of the attention" if self.attention else ""
            own = f" The model has {self.native} registers of its own{share}."
        if self.artefact is None:
            apart = "no group of patches stands apart from the others"
            if self.threshold.norm:
                apart = f"no group of patches lies above the {self.threshold} that was asked for"
            return (
                f"No artefact: {apart} (the largest norm is "
                f"{max(self.ratios):.1f} times the median of its image).{own} There is nothing to patch."
                f"{cost(self.scales)}"
            )
        found = self.artefact
        return (
            f"The artefact is there: {found.share:.2%} of the patches, in {found.images:.0%} of the images, have up to "
            f"{self.ratios[found.shown]:.0f} times the median norm, from the output of block "
            f"{found.block} on.{own}{cost(self.scales)} `testreg patch` puts registers in their place."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "family": self.family,
            "images": self.images,
            "native": self.native,
            "attention": None if self.attention is None else asdict(self.attention),
            "verdict": self.verdict,
            "artefact": None if self.artefact is None else self.artefact.to_dict(),
            "nature": None if self.nature is None else self.nature.to_dict(),
            "threshold": str(self.threshold),
            "scales": [{**asdict(scale), "times": scale.times} for scale in self.scales],
            "blocks": [
                {"block": block, **asdict(row), "ratio": ratio}
                for block, (row, ratio) in enumerate(zip(self.blocks, self.ratios, strict=True))
            ],
        }


@overload
def inspect(
    model: nn.Module, images: Any, *, threshold: float | Threshold | None = None, **running: Unpack[Running]
) -> Inspection: ...
@overload
def inspect(model: nn.Module, *, text: Any, tokenizer: Any = None, batch_size: int = 16) -> TextInspection: ...
@spelled_out
def inspect(
    model: nn.Module,
    images: Any = None,
    *,
    threshold: float | Threshold | None = None,
    text: Any = None,
    tokenizer: Any = None,
    **running: Unpack[Running],
) -> Inspection | TextInspection:
    """Patch norms per block and a verdict, of the model as it is, patched or not; arguments as in `find`.

    With `text` instead of images: attention sinks and massive activations of a causal language model, or of the one
    inside a vision-language model (see `testreg.finding.language.inspect`).

    Raises:
        BadImages, UnsupportedModel, BadPlan, TestregError: what was given cannot be used.
    """
    if text is not None:
        size = running.get("batch_size", Survey.batch_size)
        return language.inspect(model, text, tokenizer=tokenizer, batch_size=size)
    tower = find_tower(model)
    check_threshold(threshold)
    if tower.row.packed:
        running["batch_size"] = 1  # images of one sequence are told apart by being alone
    survey = Survey(model, tower, images, **running)

    def decide(counted: Counted) -> Inspection:
        norms, limit = counted.norms, chosen(counted.norms, threshold)
        found, kept = artefact(norms, limit), list(counted.sample)
        closer = glances(model, tower, kept, found)
        attention = attending(closer, tower, found)
        return Inspection(
            blocks=table(norms, limit),
            ratios=tuple(largest_ratio(norms).tolist()),
            threshold=limit,
            artefact=found,
            images=norms.images,
            family=tower.family,
            native=native(tower),
            attention=attention,
            nature=None if found is None else nature(kept, closer, found, attention),
            scales=scales(model, tower, kept[:FEW]),
        )

    return survey.decide(decide, size=KEPT)
