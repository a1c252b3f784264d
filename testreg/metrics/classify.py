"""Top-1 of logits, k nearest neighbours, and zero-shot text: which class each image gets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def top1(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest of the logits `(batch, classes)` is the label `(batch,)`."""
    return logits.argmax(dim=-1) == labels


def knn(features: Tensor, labels: Tensor, *, k: int = 20, temperature: float = 0.07) -> Tensor:
    """The class `(images,)` that its neighbours give each image, itself left out, by weighted votes (arXiv 2104.14294).

    Args:
        features: pooled outputs `(images, channels)`; neighbours are by cosine.
        labels: classes from 0 `(images,)`.
        k: neighbours that vote, or all others where there are fewer.
    """
    features = normalize(features.float(), dim=-1)
    alike = (features @ features.T).fill_diagonal_(-torch.inf)  # (images, images)
    nearest, index = alike.topk(min(k, len(features) - 1), dim=-1)  # (images, k)
    votes = torch.zeros(len(features), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[index], (nearest / temperature).exp())
    return votes.argmax(dim=-1)


def zero_shot(images: Tensor, texts: Tensor) -> Tensor:
    """The class whose text embedding `(classes, channels)` each image embedding `(images, channels)` is nearest to."""
    return (normalize(images.float(), dim=-1) @ normalize(texts.float(), dim=-1).T).argmax(dim=-1)
