"""Open-vocabulary segmentation: each patch gets the class whose name it is most like."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ... import metrics
from ...images import labels
from ...images.labels import IGNORE, Sample
from ...runtime.errors import BadImages
from ..arms import Arm
from ..dense import in_text_space, keys_as_queries, texts
from .base import Measure, Measures, Task
from .segmentation import _mean_iou, _pixel_accuracy

ATTENTIONS = ("plain", "qk", "kk")


@dataclass
class SegmentText(Task):
    """Similarity of patches and class names, upsampled to the mask: mIoU over the classes that occur.

    Classes are those that a file beside the masks names, see `testreg.images.labels.named_classes`; pixels of other
    values do not count.

    Attributes:
        attention: what of the last block is compared: "plain", its output as it is; "qk", its attention's output alone,
            without the residual stream and the MLP (arXiv 2407.12442); "kk", the same with keys in the place of queries
            (arXiv 2404.08181).
        template: what a class is called in text, in one way or several; embeddings of all of them, and of names that
            commas part, are averaged.
        foreground: only these mask values are classes.
        tokenizer: of the text tower; by default the one that lies with the checkpoint.
    """

    name: ClassVar[str] = "segment-text"
    side: int | None = 320
    attention: str = "plain"
    template: tuple[str, ...] = ("a photo of a {}.",)
    foreground: Collection[int] | None = None
    tokenizer: Any = None
    classes: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.attention not in ATTENTIONS:
            raise BadImages(f"attention must be one of {', '.join(ATTENTIONS)}, not {self.attention!r}.")
        if not self.template or not all("{}" in template for template in self.template):
            raise BadImages(f"each template needs a {{}} for the class, as in 'a photo of a {{}}.': {self.template}")

    def samples(self, data: str | Path) -> list[Sample]:
        found = labels.named_classes(data) if not self.classes else self.classes
        self.classes = {
            value: name for value, name in sorted(found.items()) if self.foreground is None or value in self.foreground
        }
        if len(self.classes) < 2:
            raise BadImages(f"{len(self.classes)} classes are named, and two are the least: {dict(self.classes)}.")
        return labels.masked(data)

    def look(self, arm: Arm, samples: Iterable[Sample]) -> list[Tensor]:
        directions = self._directions(arm)  # (classes, width)
        last = len(arm.tower.blocks) - 1
        wanted = [("states" if self.attention == "plain" else "attended", last)]
        index = self._index()
        counts = []
        with keys_as_queries(arm.tower, last) if self.attention == "kk" else nullcontext():
            for sample in samples:
                (patches,) = arm.features(arm.inputs(sample.path, self.side), wanted)  # (rows, columns, channels)
                alike = normalize(in_text_space(arm.model, arm.tower, patches), dim=-1) @ directions.T
                true = index[sample.read_mask()]
                shown = interpolate(alike.movedim(-1, 0)[None], true.shape, mode="bilinear", align_corners=False)[0]
                counts.append(metrics.intersections(shown.argmax(dim=0), true, len(self.classes)))  # (classes, 3)
        return counts

    def measure(self, seen: list[Tensor], unpatched: object) -> Measures:
        counts = np.stack([row.numpy() for row in seen])  # (images, classes, 3)
        setting = f"side {self.side}, {self.attention}, {len(self.classes)} classes, {len(self.template)} templates"
        return {
            "mIoU": Measure(counts, statistic=_mean_iou, setting=setting),
            "pixel accuracy": Measure(counts, statistic=_pixel_accuracy, setting=setting),
        }

    def floor(self, samples: list[Sample], unpatched: list[Tensor]) -> Measures:
        """The class of the most pixels, everywhere."""
        true = torch.stack(unpatched)[..., 2]  # (images, classes)
        most = int(true.sum(0).argmax())
        counts = torch.stack([torch.zeros_like(true), torch.zeros_like(true), true], dim=-1)
        counts[:, most, 0], counts[:, most, 1] = true[:, most], true.sum(1)
        return {
            f"all {self.classes[list(self.classes)[most]]}, {name}": Measure(
                measure.values, statistic=measure.statistic, kind="floor"
            )
            for name, measure in self.measure(list(counts), None).items()
        }

    def _directions(self, arm: Arm) -> Tensor:
        """One direction per class, `(classes, width)`."""
        rows = []
        for name in self.classes.values():
            names = [part.strip().replace("_", " ") for part in name.split(",")]
            prompts = [template.format(part) for part in names for template in self.template]
            rows.append(normalize(texts(arm.model, prompts, self.tokenizer), dim=-1).mean(dim=0))
        return normalize(torch.stack(rows), dim=-1)

    def _index(self) -> Tensor:
        """Mask value -> number of its class, or `IGNORE`."""
        index = torch.full((2**16,), IGNORE)
        for number, value in enumerate(self.classes):
            index[value] = number
        return index
