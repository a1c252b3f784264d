"""How far a baked model is from the unpatched one and from the run-time patch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...finding.answers import answer
from ...finding.observe import observe, run
from ...runtime.installer import patch
from ...runtime.paths import reach
from ...runtime.plan import RegisterPlan
from ...runtime.towers import Tower, find_tower
from .fit import Inputs


@dataclass(frozen=True)
class Drift:
    """Measured on images that nothing was fitted to; cosines are means.

    Attributes:
        images: how many.
        outlier: largest norm of a patch over its image's median, at any block from the last that register neurons write
            in: baked; `outlier_patched`, `outlier_unpatched`.
        patches: cosine of the patches' states after the last block with the run-time patch's.
        answer: cosine of the model's answer (logits, else image embedding, else pooled output, else class token or mean
            patch) with the unpatched model's; `answer_patched`: with the run-time patch's.
        agreement: share of images with the unpatched model's top-1 class, None without a classifier;
            `agreement_patched`: with the run-time patch's.
    """

    images: int
    outlier: float
    outlier_patched: float
    outlier_unpatched: float
    patches: float
    answer: float
    answer_patched: float
    agreement: float | None
    agreement_patched: float | None

    def __str__(self) -> str:
        same = "" if self.agreement is None else f", top-1 agreement {self.agreement:.1%}"
        same_patched = "" if self.agreement_patched is None else f", top-1 agreement {self.agreement_patched:.1%}"
        return (
            f"on {self.images} other images: largest patch norm {self.outlier:.1f} times the median "
            f"(unpatched {self.outlier_unpatched:.1f}, run-time patch {self.outlier_patched:.1f}); against the "
            f"unpatched model answer cosine {self.answer:.5f}{same}; against the run-time patch answer cosine "
            f"{self.answer_patched:.5f}{same_patched}, patch feature cosine {self.patches:.5f}"
        )


@torch.no_grad()
def measure(
    model: nn.Module, plan: RegisterPlan, baked: nn.Module, registers: RegisterPlan, images: Inputs, block: int
) -> Drift:
    """Compare `model`, `model` with `plan`, and `baked` with register slots.

    Args:
        model: without a patch.
        registers: the slots as a plan, as `fit.slots` gives them.
        block: from whose output on outliers are looked for.
    """
    total: dict[str, list[Tensor]] = {}

    def note(**values: Tensor) -> None:
        for name, value in values.items():
            total.setdefault(name, []).append(value)

    for inputs in images:
        before = _look(model, None, inputs, block)
        patched = _look(model, plan, inputs, block)
        after = _look(baked, registers, inputs, block)
        note(
            outlier=after.outlier,
            outlier_patched=patched.outlier,
            outlier_unpatched=before.outlier,
            patches=torch.cosine_similarity(after.patches, patched.patches, dim=-1).mean(-1),
            answer=torch.cosine_similarity(after.answer, before.answer, dim=-1),
            answer_patched=torch.cosine_similarity(after.answer, patched.answer, dim=-1),
        )
        if after.classes:
            note(agreement=_agree(after, before), agreement_patched=_agree(after, patched))
    rows = {name: torch.cat(values) for name, values in total.items()}
    numbers = {name: float(row.max() if "outlier" in name else row.mean()) for name, row in rows.items()}
    return Drift(
        images=len(rows["answer"]),
        **{**{"agreement": None, "agreement_patched": None}, **numbers},  # type: ignore[arg-type]
    )


@dataclass
class _Look:
    outlier: Tensor  # (images,)
    patches: Tensor  # (images, patches, channels)
    answer: Tensor  # (images, width)
    classes: bool


def _look(model: nn.Module, plan: RegisterPlan | None, inputs: dict[str, Tensor], block: int) -> _Look:
    tower = find_tower(model)
    last = len(tower.blocks) - 1
    acting = patch(model, plan) if plan else None
    try:
        with observe(model, states=range(block, last + 1)) as seen:
            output = run(model, inputs, whole=True)
    finally:
        if acting:
            acting.remove()
    norms = torch.stack([state[:, tower.prefix :].norm(dim=-1) for state in seen.states.values()], dim=1)
    ratio = norms / norms.median(dim=-1, keepdim=True).values  # (images, blocks, patches)
    patches = seen.states[last][:, tower.prefix :]
    kind, said = answer(output, lambda: _last_state(output, tower))
    classes = kind == "logits" and reach(tower.module, "num_classes") != 0  # without any, timm's models give features
    return _Look(ratio.amax(dim=(1, 2)), patches, said, classes)


def _last_state(output: Any, tower: Tower) -> Tensor:
    """The class token, or the mean token, after the last block; of a backbone its last map."""
    tokens = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
    if tokens is None:
        return output.feature_maps[-1].flatten(1)  # (images, channels, rows, columns) or (images, tokens, channels)
    return tokens[:, 0] if tower.prefix else tokens.mean(1)


def _agree(one: _Look, other: _Look) -> Tensor:
    return (one.answer.argmax(-1) == other.answer.argmax(-1)).float()
