"""What a model says of each image as a whole, whatever it gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..runtime import Tower


def summary(output: Any, tokens: Tensor, tower: Tower) -> Tensor:
    """What a model says of each image, `(images, channels)`: its logits, else its pooled output, else what is there.

    Args:
        tokens: the last block's output `(images, tokens, channels)`, whose class token, or mean patch, is the last
            resort.
    """
    if tower.row.packed:
        return _direction(output, tokens)
    for name in ("logits", "image_embeds", "pooler_output"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor) and found.ndim == 2:
            return found.float()
    if isinstance(output, Tensor) and output.ndim == 2:  # timm's models give logits as they are
        return output.float()
    return (tokens[:, 0] if tower.prefix else tokens.mean(1)).float()


def _direction(output: Any, tokens: Tensor) -> Tensor:
    """What a packed tower says of its one image `(1, channels)`: the mean direction of what it makes of the patches.

    It merges them in squares, so there are many; as directions none counts for more than another.
    """
    for name in ("pooler_output", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor) and found.shape[:-1].numel() > 1:
            tokens = found
            break
    return torch.nn.functional.normalize(tokens.float().flatten(0, -2), dim=-1).mean(0, keepdim=True)
