"""`report`: one HTML file that shows a model before and after, with nothing to load from outside."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from PIL import Image
from torch import Tensor, nn

from ..finding.detect import threshold_of
from ..finding.inspection import Inspection, inspect
from ..finding.observe import observe, run, unpatched
from ..finding.places import in_place
from ..finding.trial import Threshold
from ..images.streaming import stream
from ..images.takes import pixels
from ..metrics.agreement import agreement
from ..metrics.outliers import BlockNorms, block_norms, ratios
from ..runtime.errors import BadPlan
from ..runtime.installer import active, patch
from ..runtime.plan import RegisterPlan
from ..runtime.towers import find_tower
from . import charts
from .asking import ask
from .pictures import BLANK, View, as_photo, clearest_block, first, photographs, views

GALLERY = 8  # photos that are shown
BINS_PER_DOUBLING = 4


@dataclass(frozen=True)
class Side:
    """The model in one state, on the same images as the other side.

    Attributes:
        views: norms and attention, one per image.
        features: patches after the last block, of the gallery's images, each `(rows, columns, channels)`.
        answers: what the model says of each image `(images, channels)`.
    """

    views: list[View]
    features: list[Tensor]
    answers: Tensor

    @property
    def norms(self) -> list[Tensor]:
        """Of each image, `(blocks, patches)`."""
        return [view.norms.flatten(1) for view in self.views]

    def ratios(self, block: int) -> Tensor:
        """Norms after a block as multiples of their image's median, of all patches of all images `(patches,)`."""
        return torch.cat([ratios(norms[block]) for norms in self.norms])

    def outliers(self, block: int, threshold: Threshold) -> float:
        """The share of all patches of all images that are outliers after a block, 0..1."""
        return float(torch.cat([threshold.outliers(norms[block]) for norms in self.norms]).float().mean())


def report(
    model: nn.Module,
    images: Any,
    *,
    plan: RegisterPlan | str | Path | None = None,
    processor: Any = None,
    title: str | None = None,
    most: int = 64,
) -> str:
    """A page that shows `model` before and after, as HTML text.

    Args:
        model: a Vision Transformer, or a model that holds one, patched or not; as it was afterwards.
        images: whatever `testreg.find` takes; photos that the plan was not found on say more.
        plan: the registers, or the path of their file; by default those of the patch that acts on the model; with
            neither, the model is shown as it is. An outlier is what it was when the plan was found.
        title: by default the model's name.
        most: use at most so many images, the first.

    Raises:
        BadImages: none of the images can be read.
        BadPlan: the plan does not fit the model.
        UnsupportedModel: no family describes the model, or it gives no attention maps.
    """
    current = active(model)
    plan = RegisterPlan.of(plan) if plan is not None else current.plan if current else None
    packed = find_tower(model).row.packed
    source = stream(images, processor, model=model, batch_size=1 if packed else 16)
    batches, digests = [list(part) for part in zip(*first(source, most), strict=True)]
    source.warn()
    with unpatched(model):
        found = inspect(model, batches, threshold=threshold_of(plan) if plan else None)
        before = _look(model, batches)
    after = None
    if plan is not None:
        with patch(model, plan):
            after = _look(model, batches)
    if packed:
        seen = photographs(images)
        pictures = [seen.get(digest, BLANK) for row in digests for digest in row][:GALLERY]
    else:
        pictures = [as_photo(image, source.processor) for batch in batches for image in pixels(batch)][:GALLERY]
    block = clearest_block(before.views)
    named = title or getattr(model, "name_or_path", "").rstrip("/").split("/")[-1] or type(model).__name__
    environment = Environment(loader=PackageLoader("testreg.judging"), autoescape=True, undefined=StrictUndefined)
    page = {
        "title": named,
        "verdict": verdict(found, before, after, plan),
        "numbers": _numbers(found, before, after, block),
        "block": block,
        "blocks": _blocks(before, after, found.threshold),
        "norms_chart": Markup(_norms_chart(before, after)),
        "histogram": Markup(_histogram(before, after, block, found.threshold.times)),
        "gallery": _gallery(pictures, before, after, block),
        "nature": found.nature.sentences if found.nature else [],
        "attention": "Class-token attention" if find_tower(model).prefix else "Attention that each patch receives",
        "plan": None if plan is None else plan.to_dict(),
        "plan_text": "" if plan is None else str(plan),
        "images": len(before.views),
        "threshold": str(found.threshold),
    }
    try:
        return environment.get_template("report.html").render(page)
    except (TypeError, ValueError, UndefinedError) as error:  # all but the provenance is made above
        raise BadPlan(f"the plan's provenance is not of the form that testreg writes: {error}") from error


def verdict(found: Inspection, before: Side, after: Side | None, plan: RegisterPlan | None) -> str:
    """One sentence for someone who reads nothing else."""
    if after is None or plan is None or found.artefact is None:
        return found.verdict
    share = [side.outliers(found.artefact.shown, found.threshold) for side in (before, after)]
    kept = agreement(after.answers, before.answers)
    change = f"outlier patches go from {share[0]:.2%} to {share[1]:.2%}, and the output keeps a cosine of "
    change += f"{float(kept.cosine.mean()):.4f} with what it was"
    registers = f"{plan.registers} register{'s' * (plan.registers != 1)}"
    if share[1] == 0:
        return f"{registers} take the artefact away: {change}."
    if share[1] <= 0.1 * share[0]:
        return f"{registers} take most of the artefact away: {change}."
    return f"{registers} do not take the artefact away: {change}."


def _look(model: nn.Module, batches: list[Mapping[str, Tensor]]) -> Side:
    tower = find_tower(model)
    last = len(tower.blocks) - 1
    seen: list[View] = []
    features: list[Tensor] = []
    answers: list[Tensor] = []
    for inputs in batches:
        seen += views(model, inputs)
        answers.append(ask(model, inputs)[1])
        if len(features) < GALLERY:
            with observe(model, states=[last]) as state:
                run(model, inputs)
            patches = state.states[last][:, tower.prefix :].float().cpu()
            features += list(in_place(patches, tower, inputs, 1))
    return Side(seen, features[:GALLERY], torch.cat(answers))


def _numbers(found: Inspection, before: Side, after: Side | None, block: int) -> list[dict[str, str]]:
    """The figures on top: name, before, after."""

    def outliers(side: Side) -> str:
        return f"{side.outliers(block, found.threshold):.2%}"

    def largest(side: Side) -> str:
        return f"{float(side.ratios(block).max()):.1f}×"

    def most_attention(side: Side) -> str:
        return f"{float(torch.stack([view.attention.max() for view in side.views]).mean()):.1%}"

    rows = [
        {"name": name, "before": of(before), "after": "" if after is None else of(after)}
        for name, of in (
            ("outlier patches", outliers),
            ("largest norm, times the median", largest),
            ("attention on one patch, mean of the largest", most_attention),
        )
    ]
    if after is not None:
        kept = agreement(after.answers, before.answers)
        registers = sum(view.registers for view in after.views) / len(after.views)
        rows += [
            {"name": "attention on registers", "before": "0.0%", "after": f"{registers:.1%}"},
            {"name": "cosine of the output with before", "before": "1", "after": f"{float(kept.cosine.mean()):.4f}"},
            {"name": "same largest output", "before": "100.0%", "after": f"{float(kept.same.float().mean()):.1%}"},
        ]
    return rows


def _blocks(before: Side, after: Side | None, threshold: Threshold) -> list[dict[str, BlockNorms | None]]:
    first = block_norms(before.norms, threshold.times, threshold.norm)
    second: list[Any] = [None] * len(first)
    if after is not None:
        second = block_norms(after.norms, threshold.times, threshold.norm)
    return [{"before": one, "after": other} for one, other in zip(first, second, strict=True)]


def _norms_chart(before: Side, after: Side | None) -> str:
    series = {}
    for name, side in (("before", before), ("after", after)):
        if side is not None:
            norms = torch.cat(side.norms, dim=1)  # (blocks, all patches)
            series[f"{name} largest"] = norms.amax(dim=1).tolist()
            series[f"{name} median"] = norms.median(dim=1).values.tolist()
    return charts.lines(series, across="after block")


def _histogram(before: Side, after: Side | None, block: int, times: float) -> str:
    rows = {name: side.ratios(block) for name, side in (("before", before), ("after", after)) if side is not None}
    low = min(float(row.min()) for row in rows.values())
    high = max(times, *(float(row.max()) for row in rows.values()))
    first = int(np.floor(np.log2(max(low, 1e-3)) * BINS_PER_DOUBLING))
    last = int(np.ceil(np.log2(high) * BINS_PER_DOUBLING)) + 1
    edges = 2.0 ** (np.arange(first, last + 1) / BINS_PER_DOUBLING)
    counts = {name: np.histogram(row.numpy(), edges)[0].tolist() for name, row in rows.items()}
    return charts.histogram(counts, edges.tolist(), across=f"norm after block {block}, times the median of its photo")


def _gallery(photos: list[Tensor], before: Side, after: Side | None, block: int) -> list[dict[str, Any]]:
    sides = [side for side in (before, after) if side is not None]
    shown = [view.norms[block] for side in sides for view in side.views[: len(photos)]]
    scale = LogNorm(max(min(float(norms.min()) for norms in shown), 1e-6), max(float(norms.max()) for norms in shown))
    basis = _basis(sides[-1].features)
    rows = []
    for index, photo in enumerate(photos):
        maps: dict[str, list[str]] = {"norms": [], "attention": [], "pca": []}
        notes: dict[str, list[str]] = {"norms": [], "attention": [], "pca": []}
        for side in sides:
            view = side.views[index]
            norms, attention = view.norms[block], view.attention
            maps["norms"].append(png(colormaps["inferno"](scale(norms.clamp(min=1e-6).numpy()))))
            maps["attention"].append(png(colormaps["inferno"]((attention / attention.max()).numpy())))
            maps["pca"].append(png(_colours(side.features[index], basis)))
            notes["norms"].append(f"largest {float(norms.max()):.3g}, median {float(norms.median()):.3g}")
            registers = f", registers {view.registers:.0%}" if side is after else ""
            notes["attention"].append(f"largest {float(attention.max()):.1%}{registers}")
            notes["pca"].append("first three components")
        ratio = f"{photo.shape[1]} / {photo.shape[0]}"
        rows.append({"photo": _jpeg(photo), "ratio": ratio, "maps": maps, "notes": notes})
    return rows


def _basis(features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, first three principal directions, and the range along them, of the patches of all images."""
    flat = torch.cat([row.flatten(0, 1) for row in features])  # (all patches, channels)
    mean = flat.mean(dim=0)
    directions = torch.linalg.eigh((flat - mean).T @ (flat - mean)).eigenvectors[:, -3:].flip(1)  # (channels, 3)
    along = (flat - mean) @ directions
    return mean, directions, along.quantile(0.01, dim=0), along.quantile(0.99, dim=0)


def _colours(features: Tensor, basis: tuple[Tensor, Tensor, Tensor, Tensor]) -> np.ndarray:
    mean, directions, low, high = basis
    return (((features - mean) @ directions - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).numpy()


def png(values: np.ndarray) -> str:
    """Colours `(rows, columns, 3 or 4)` in 0..1 as a data URL, one pixel per patch."""
    return _url(Image.fromarray((values[..., :3] * 255).round().astype(np.uint8)), "PNG")


def _jpeg(photo: Tensor) -> str:
    return _url(Image.fromarray((photo * 255).round().to(torch.uint8).numpy()), "JPEG", quality=85)


def _url(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def save(page: str, path: str | Path) -> None:
    """Write a page."""
    Path(path).expanduser().write_text(page, encoding="utf-8")
