"""How much of the model's answer stays: the price of a patch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity


@dataclass(frozen=True)
class Agreement:
    """Per image, `(batch,)`.

    Attributes:
        cosine: between the two outputs, -1..1.
        same: whether the largest entry is the same one (the top-1 class, where the outputs are logits).
    """

    cosine: Tensor
    same: Tensor


def agreement(output: Tensor, reference: Tensor) -> Agreement:
    """Compare logits or pooled outputs `(batch, channels)` with those of the unpatched model."""
    output, reference = output.float(), reference.float()
    return Agreement(cosine_similarity(output, reference, dim=-1), output.argmax(dim=-1) == reference.argmax(dim=-1))
