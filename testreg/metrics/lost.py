"""LOST: one object box per image from patch features, without labels (arXiv 2109.14279)."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_SIMILAR = 100  # how many of the least connected patches may join the seed; the paper's k


def lost(features: Tensor, *, bias: float | None = -0.4) -> tuple[int, int, int, int]:
    """The box that LOST finds on patch features `(rows, columns, channels)`.

    The seed is the patch that fewest others resemble; patches of low degree that resemble the seed join it, and the
    object is the connected region around the seed that resembles them all together (sections 3.1 to 3.3).

    Args:
        bias: added to the similarities of L2-normalised features, in -1..0, as Darcet et al. (arXiv 2309.16588,
            appendix) do for models whose features are all alike; None = the paper's own inner products.

    Returns:
        `(left, top, right, bottom)` in patches, the right and bottom edges not included.
    """
    from scipy import ndimage  # of the extra "evaluate"

    rows, columns = features.shape[:2]
    flat = features.flatten(0, 1).float()  # (patches, channels)
    if bias is not None:
        flat = torch.nn.functional.normalize(flat, dim=-1)
    alike = flat @ flat.T + (bias or 0.0)  # (patches, patches)
    degree = (alike > 0).sum(dim=1) - (alike.diagonal() > 0).int()  # of others that resemble a patch
    lowest = degree.argsort(stable=True)[:MOST_SIMILAR]
    seed = int(lowest[0])
    similar = lowest[alike[seed, lowest] > 0]
    region = (alike[similar].sum(dim=0) > 0).reshape(rows, columns)
    regions, _ = ndimage.label(region.cpu().numpy())
    row, column = divmod(seed, columns)
    if not regions[row, column]:  # a seed that resembles nothing, itself included
        return column, row, column + 1, row + 1
    height, width = ndimage.find_objects(regions)[regions[row, column] - 1]
    return width.start, height.start, width.stop, height.stop


def overlap(box: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of one box `(4,)` with each of `(boxes, 4)`, all `(left, top, right, bottom)`."""
    corner = torch.maximum(box[:2], boxes[:, :2]), torch.minimum(box[2:], boxes[:, 2:])
    common = (corner[1] - corner[0]).clamp(min=0).prod(dim=-1)
    area = (box[2:] - box[:2]).prod()
    return common / (area + (boxes[:, 2:] - boxes[:, :2]).prod(dim=-1) - common)


def located(box: Tensor, boxes: Tensor, *, at: float = 0.5) -> bool:
    """Whether a box hits any of the objects, as CorLoc counts: IoU of at least `at` with one of `boxes`."""
    return bool((overlap(box, boxes) >= at).any())
