"""What a model says of each image as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

KINDS = ("logits", "image_embeds", "pooler_output")  # as outputs of transformers name them, the best first


def answer(output: Any, otherwise: Callable[[], Tensor]) -> tuple[str, Tensor]:
    """A model's answer `(images, channels)` in float32, and which of `KINDS` it is; "state" where it gives none.

    Args:
        output: what the forward pass gave. A tensor of one row per image is logits, as timm gives them.
        otherwise: makes the answer `(images, channels)` of a model that has none of its own.
    """
    if isinstance(output, Tensor) and output.ndim == 2:
        return "logits", output.float()
    for kind in KINDS:
        found = getattr(output, kind, None)
        if isinstance(found, Tensor) and found.ndim == 2:
            return kind, found.float()
    return "state", otherwise().float()


def direction(output: Any, tokens: Tensor) -> Tensor:
    """What a packed tower says of its one image `(1, channels)`: the mean direction of what it makes of the patches.

    It merges them in squares, so there are many; as directions none counts for more than another.

    Args:
        tokens: the last block's output `(1, tokens, channels)`, for a tower that gives nothing else.
    """
    for name in ("pooler_output", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor) and found.shape[:-1].numel() > 1:
            tokens = found
            break
    return normalize(tokens.float().flatten(0, -2), dim=-1).mean(0, keepdim=True)
