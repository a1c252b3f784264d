"""`inspect`: has a model the artefact, and where?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from .detect import Artefact, artefact, check_norm, chosen, largest_ratio, table
from .families import find_tower
from .images import stream
from .metrics.outliers import BlockNorms
from .parallel import share, shared
from .search import Counted, count, quiet, total
from .trial import Threshold


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
    """

    blocks: tuple[BlockNorms, ...]
    ratios: tuple[float, ...]
    threshold: Threshold
    artefact: Artefact | None
    images: int
    family: str

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.artefact is None:
            return (
                f"No artefact: no group of patches stands apart from the others (the largest norm is "
                f"{max(self.ratios):.1f} times the median of its image). There is nothing to patch."
            )
        found = self.artefact
        return (
            f"The artefact is there: {found.share:.2%} of the patches, in {found.images:.0%} of the images, have up to "
            f"{self.ratios[found.shown]:.0f} times the median norm, from the output of block {found.block} on."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "family": self.family,
            "images": self.images,
            "verdict": self.verdict,
            "artefact": None if self.artefact is None else asdict(self.artefact),
            "threshold": str(self.threshold),
            "blocks": [
                {"block": block, **asdict(row), "ratio": ratio}
                for block, (row, ratio) in enumerate(zip(self.blocks, self.ratios, strict=True))
            ],
        }


def inspect(
    model: nn.Module,
    images: Any,
    *,
    processor: Callable[..., Any] | None = None,
    batch_size: int = 16,
    workers: int = 0,
    threshold: float | None = None,
    progress: bool = False,
) -> Inspection:
    """Patch norms per block and a verdict, of the model as it is, patched or not; arguments as in `find`.

    Raises:
        BadImages, UnsupportedModel, BadPlan: what was given cannot be used.
    """
    tower = find_tower(model)
    check_norm(threshold)
    batches = stream(images, processor, model=model, batch_size=batch_size, workers=workers, share=share())

    def decide(parts: list[Counted]) -> Inspection:
        norms = total(parts, batches).norms
        limit = chosen(norms, threshold)
        ratios = tuple(largest_ratio(norms).tolist())
        return Inspection(table(norms, limit), ratios, limit, artefact(norms, limit), norms.images, tower.family)

    with quiet(model):
        return shared(lambda: count(model, tower, batches, progress, size=1), decide)
