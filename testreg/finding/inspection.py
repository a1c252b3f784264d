"""`inspect`: has a model the artefact, and where?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from ..metrics.outliers import BlockNorms
from ..metrics.sinks import EPSILON, received
from ..runtime.errors import UnsupportedModel
from ..runtime.paths import reach
from ..runtime.towers import Tower, find_tower
from . import language
from .count import Counted
from .detect import Artefact, artefact, check_threshold, chosen, largest_ratio, table
from .observe import observe, run
from .scan import Kept
from .survey import Running, Survey, spelled_out
from .text_inspection import TextInspection
from .trial import Threshold

if TYPE_CHECKING:
    from typing_extensions import Unpack

NATIVE = (
    "config.num_register_tokens",
    "config.num_registers",
    "num_reg_tokens",
    "num_register_tokens",
    "n_storage_tokens",
    "patch_generator.num_registers",
)
FEW = 4  # images whose attention maps are looked at


@dataclass(frozen=True)
class Attending:
    """Where attention goes: shares of 1 that get there from the mean query, mean over blocks, heads and a few images.

    Attributes:
        patch: to the one patch that gets most.
        prefix: to class and distillation token.
        native: to registers that the model was trained with.
        registers: to test-time registers.
        rate: sink rate of the patch that is a sink in most blocks and heads (arXiv 2410.10781, section 3.1).
    """

    patch: float
    prefix: float
    native: float
    registers: float
    rate: float


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
    """

    blocks: tuple[BlockNorms, ...]
    ratios: tuple[float, ...]
    threshold: Threshold
    artefact: Artefact | None
    images: int
    family: str
    native: int
    attention: Attending | None

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
            )
        found = self.artefact
        return (
            f"The artefact is there: {found.share:.2%} of the patches, in {found.images:.0%} of the images, have up to "
            f"{self.ratios[found.shown]:.0f} times the median norm, from the output of block "
            f"{found.block} on.{own} `testreg patch` puts registers in their place."
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
            "threshold": str(self.threshold),
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
        return Inspection(
            blocks=table(norms, limit),
            ratios=tuple(largest_ratio(norms).tolist()),
            threshold=limit,
            artefact=artefact(norms, limit),
            images=norms.images,
            family=tower.family,
            native=_native(tower),
            attention=_attending(model, tower, counted.sample),
        )

    return survey.decide(decide, size=FEW)


class _Received(dict[int, Tensor]):
    """Attention maps, of which only what every token receives is kept `(images, heads, tokens)`."""

    def __setitem__(self, block: int, maps: Tensor) -> None:
        super().__setitem__(block, received(maps).cpu())


def _attending(model: nn.Module, tower: Tower, images: Iterable[Kept]) -> Attending | None:
    rows = []
    native = _native(tower)
    blocks = range(len(tower.blocks))
    try:
        with observe(model, attentions=blocks) as seen:
            for image in images:
                seen.attentions = _Received()
                run(model, image.inputs)
                alpha = torch.stack([seen.attentions[block] for block in blocks]).squeeze(1)  # (blocks, heads, tokens)
                patches = alpha[..., tower.prefix :]
                shares = (
                    patches.amax(-1).mean(),
                    alpha[..., : tower.prefix - native].sum(-1).mean(),
                    alpha[..., tower.prefix - native : tower.prefix].sum(-1).mean(),
                    (1 - alpha.sum(-1)).clamp(min=0).mean(),
                    (patches > EPSILON).float().mean((0, 1)).amax(),
                )
                rows.append(torch.stack(shares))
    except UnsupportedModel:  # its attention gives no maps
        return None
    return Attending(*torch.stack(rows).mean(0).tolist())


def native(model: nn.Module) -> int:
    """How many registers a model was trained with."""
    return _native(find_tower(model))


def _native(tower: Tower) -> int:
    return int(reach(tower.module, NATIVE) or 0)
