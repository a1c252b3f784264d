"""Classes of whole photos: the model's own head, nearest neighbours, or text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ... import metrics
from ...images import labels
from ...images.labels import Sample
from ..arms import Arm
from ..asking import ask
from ..dense import texts
from .base import Measure, Measures, Task


@dataclass
class Classify(Task):
    """Top-1 accuracy on a folder of photos per class.

    Every way that the model allows is measured: its own head where the folders carry its classes' names or numbers,
    nearest neighbours of the pooled output, and zero-shot text for models that read text.

    Attributes:
        k: neighbours that vote.
        tokenizer: of the text tower; by default the one that lies with the checkpoint.
        prompt: what a class is called in text.
    """

    name: ClassVar[str] = "classify"
    repairable: ClassVar[bool] = False
    k: int = 20
    tokenizer: Any = None
    prompt: str = "a photo of a {}."
    classes: list[str] = field(default_factory=list)

    def samples(self, data: str | Path) -> list[Sample]:
        found = labels.labelled(data)
        self.classes = sorted({str(sample.label) for sample in found})
        return found

    def look(self, arm: Arm, samples: Iterable[Sample]) -> dict[str, np.ndarray]:
        outputs, kinds, true = [], set(), []
        for sample in samples:
            kind, output = ask(arm.model, arm.inputs(sample.path, self.side))
            outputs.append(output)
            kinds.add(kind)
            true.append(self.classes.index(str(sample.label)))
        output, target = torch.cat(outputs), torch.tensor(true)
        found = {f"kNN top-1, k {self.k}": metrics.knn(output, target, k=self.k) == target}
        columns = _columns(arm.model, self.classes)
        if kinds == {"logits"} and columns is not None:
            found["top-1 of the head"] = metrics.top1(output, torch.tensor(columns)[target])
        if kinds == {"image_embeds"}:
            prompts = [self.prompt.format(name.replace("_", " ")) for name in self.classes]
            found["zero-shot top-1"] = metrics.zero_shot(output, texts(arm.model, prompts, self.tokenizer)) == target
        return {name: hits.float().numpy() for name, hits in found.items()}

    def measure(self, seen: dict[str, np.ndarray], unpatched: object) -> Measures:
        return {name: Measure(hits) for name, hits in seen.items()}

    def floor(self, samples: list[Sample], unpatched: object) -> Measures:
        names = [sample.label for sample in samples]
        most = max(set(names), key=names.count)
        return {"always the most common class": Measure(np.array([n == most for n in names], float), kind="floor")}


def _columns(model: Any, classes: list[str]) -> list[int] | None:
    """The logit of each class, by its name or number in the model's configuration; None where one is not there."""
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    numbers = {str(name): int(index) for index, name in names.items()} | {str(index): int(index) for index in names}
    found = [numbers.get(name) for name in classes]
    return None if None in found else [index for index in found if index is not None]
