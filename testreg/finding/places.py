"""Where patches are in their image: row by row in most towers, in squares or window by window in packed ones."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

import torch
from torch import Tensor

from ..runtime import Tower
from ..runtime.errors import UnsupportedModel
from ..runtime.paths import reach


def in_place(values: Tensor, tower: Tower, inputs: Mapping[str, Tensor], dim: int = -1) -> Tensor:
    """Values of the patches of images of one size, their axis `dim` parted into rows and columns.

    Args:
        inputs: what the tower was given, with an axis of images; of a packed tower, one image.

    Raises:
        UnsupportedModel: they are in no grid.
    """
    patches = values.shape[dim]
    if not tower.row.packed:
        height, width = inputs["pixel_values"].shape[-2:]
        return values.unflatten(dim, grid(height, width, patches))
    given = next((value[0].tolist() for name, value in inputs.items() if "grid" in name), None)
    if given is None:
        height, width = inputs["image_sizes"][0].tolist()
        return values.unflatten(dim, grid(height, width, patches))
    frames, rows, columns = given
    if frames > 1:
        raise UnsupportedModel("maps can be drawn for photos alone, not for videos.")
    cells = isqrt(patches // (rows * columns))  # patches on a side of what the grid counts
    merge = reach(tower.module, tower.row.merge) if tower.row.merge else 1
    if merge is None:  # it comes with each image
        merge = next((int(value[0]) for name, value in inputs.items() if "merge" in name), 1)
    window = reach(tower.module, tower.row.window) if tower.row.window else 0
    side = window // merge // int(reach(tower.module, ("patch_size", "config.patch_size")) or 1)
    order = raster(rows * cells, columns * cells, merge, side)
    return values.index_select(dim, order.argsort().to(values.device)).unflatten(dim, (rows * cells, columns * cells))


def raster(rows: int, columns: int, merge: int = 1, window: int = 0) -> Tensor:
    """For each patch in the order of a packed tower, its number row by row, `(patches,)`.

    Args:
        merge: patches come in squares of so many by so many.
        window: and these window by window, each of so many squares by so many; 0 = there are none.
    """
    numbers = torch.arange(rows * columns).view(rows // merge, merge, columns // merge, merge)
    squares = numbers.transpose(1, 2).reshape(
        rows // merge, columns // merge, -1
    )  # (rows, columns, patches) of squares
    if not window:
        return squares.flatten()
    row, column = (torch.arange(length) // window for length in squares.shape[:2])
    of = row[:, None] * squares.shape[1] + column[None]  # the window of each square
    return squares.flatten(0, 1)[of.flatten().argsort(stable=True)].flatten()


def grid(height: int, width: int, patches: int) -> tuple[int, int]:
    """Rows and columns of `patches` square patches that cover an image of `height` by `width` pixels.

    Raises:
        UnsupportedModel: no grid of square patches has that many.
    """
    for size in range(1, min(height, width) + 1):  # both counts only fall with the size, so the first match is the one
        if (height // size) * (width // size) == patches:
            return height // size, width // size
    raise UnsupportedModel(
        f"{patches} patches are no grid of square ones on an image of {height} × {width} pixels; "
        f"maps can only be drawn for models that keep every patch in its place."
    )
