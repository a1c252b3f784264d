"""Packed towers judged: through a processor, photo by photo, each of its own size, with patches in their places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import packed
import pytest
import torch
import transformers as hf
from PIL import Image
from torch import Tensor, nn
from transformers import vision_utils

import testreg
from testreg.finding.observe import observe, run
from testreg.finding.places import in_place, raster
from testreg.judging.evaluation import evaluate
from testreg.judging.pictures import show, views
from testreg.judging.reporting import report
from testreg.judging.tasks import TASKS
from testreg.runtime.towers import find_tower

SIZES = [(32, 24), (24, 40), (40, 16), (32, 32), (16, 40), (24, 24), (40, 40), (32, 16), (16, 16), (40, 24)]
BLOCK, NEURON, STRENGTH = 1, 7, 40.0
LOUD = (1, 2)  # row and column of the one white patch


def processor() -> Any:
    return hf.Qwen2VLImageProcessor(
        patch_size=packed.PATCH, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
    )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Dark noise of several sizes, with one white patch each."""
    generator = np.random.default_rng(0)
    for index, (height, width) in enumerate(SIZES):
        pixels = generator.integers(0, 60, (height, width, 3), dtype=np.uint8)
        row, column = (packed.PATCH * place for place in LOUD)
        pixels[row : row + packed.PATCH, column : column + packed.PATCH] = 255
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    return tmp_path


@torch.no_grad()
def planted(kind: str, photos: Path) -> nn.Module:
    """A tower one of whose neurons fires at the white patch, and writes an outlier there."""
    model = packed.build(kind)
    tower, seen, marks = find_tower(model), [], []
    inside = set(map(id, tower.attentions[BLOCK].modules()))
    readers = [
        part
        for part in tower.blocks[BLOCK].modules()
        if isinstance(part, nn.Linear) and id(part) not in inside and part is not tower.downs[BLOCK]
    ]
    handle = readers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for batch in testreg.images.streaming.stream(photos, processor(), batch_size=1):
        run(model, batch.inputs)
        mark = torch.zeros(len(seen[-1]))
        rows, columns = batch.inputs["image_grid_thw"][0, 1:].tolist()
        numbers = in_place(torch.arange(rows * columns), tower, batch.inputs)
        mark[numbers[LOUD]] = 1
        marks.append(mark)
    handle.remove()
    flat, wanted = torch.cat(seen).double(), torch.cat(marks).double()
    flat = torch.cat([flat, torch.ones(len(flat), 1, dtype=flat.dtype)], 1)
    weights = 1 + wanted * (len(wanted) / wanted.sum() - 1)
    fit = torch.linalg.lstsq(flat * weights[:, None].sqrt(), (wanted * weights.sqrt())[:, None]).solution[:, 0]
    for reader in readers:
        reader.weight[NEURON] = 8 * fit[:-1].float()
        if reader.bias is not None:
            reader.bias[NEURON] = 8 * (fit[-1] - 0.5).float()
    column = torch.randn(tower.channels, generator=torch.Generator().manual_seed(7))
    tower.downs[BLOCK].weight[:, NEURON] = STRENGTH * (column - column.mean())
    return model


KINDS = pytest.mark.parametrize("kind", ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"])


@KINDS
def test_from_photos_to_a_picture_a_report_and_a_table(kind, photos, tmp_path):
    model = planted(kind, photos)
    looked = testreg.inspect(model, photos, processor=processor())
    assert looked.artefact is not None
    assert looked.attention is not None
    plan = testreg.find(model, photos, processor=processor(), force=True)
    assert (BLOCK, NEURON) in plan.pairs

    for batch in testreg.images.streaming.stream(photos, processor(), batch_size=1):
        (view,) = views(model, batch.inputs)
        norms = view.norms[BLOCK]
        assert norms.shape == tuple(batch.inputs["image_grid_thw"][0, 1:].tolist())
        assert divmod(int(norms.argmax()), norms.shape[1]) == LOUD  # where the photo is white

    figure = show(model, plan, photos, processor=processor())
    assert len(figure.axes) >= 5 * len(SIZES)
    drawn = figure.axes[0].images[0].get_array()
    assert drawn.max() > 0.99  # the photo, not its patches
    page = report(model, photos, plan=plan, processor=processor())
    assert page.count("data:image/jpeg") >= 4
    for task in ("outliers", "agreement", "sinks"):
        table = evaluate(model, photos, TASKS[task](), plan=plan, processor=processor())
        arms = {row.arm for row in table.rows}
        assert {"unpatched", "patched", "inert zero token", "random neurons instead"} <= arms
        if task == "outliers":
            assert table.of("patched", "outlier patches").value == 0
            assert table.of("unpatched", "outlier patches").value > 0
            assert table.of("inert zero token", "outlier patches").value > 0
        if task == "agreement":
            assert table.of("patched", "cosine").value > 0.9


# The order of patches, by transformers' own words


@pytest.mark.parametrize(("rows", "columns"), [(8, 12), (4, 8), (12, 4)])
@pytest.mark.parametrize("merge", [1, 2])
def test_squares_are_in_the_order_of_their_positions(rows, columns, merge):
    places = vision_utils.get_vision_position_ids(torch.tensor([[1, rows, columns]]), merge)
    assert raster(rows, columns, merge).tolist() == (places[:, 0] * columns + places[:, 1]).tolist()


@pytest.mark.parametrize(("rows", "columns"), [(8, 12), (4, 8), (10, 6)])
@pytest.mark.parametrize(("merge", "window"), [(2, 2), (1, 3), (2, 1)])
def test_windows_are_in_the_order_of_their_index(rows, columns, merge, window):
    index, _ = vision_utils.get_vision_window_index(
        torch.tensor([[1, rows, columns]]), spatial_merge_size=merge, window_size=window * merge * 4, patch_size=4
    )
    squares = raster(rows, columns, merge).view(-1, merge * merge)
    assert raster(rows, columns, merge, window).tolist() == squares[index].flatten().tolist()


@pytest.mark.parametrize("name", list(packed.ROWS))
def test_patches_of_every_tower_are_in_their_place(name):
    """A patch is loud in the pixels; its place is where transformers' positions say that it is."""
    model, grid = packed.build(name), (1, 4, 8)
    tower, given = find_tower(model), packed.inputs(name, [grid])
    pixels = next(iter(given.values()))
    louder = dict(given)
    loud = pixels.clone()
    row, column = 1, 5  # in another place window by window than square by square
    if name == "Pixtral":
        loud[
            ..., row * packed.PATCH : (row + 1) * packed.PATCH, column * packed.PATCH : (column + 1) * packed.PATCH
        ] += 9
    elif name == "Inkling-2":
        half = packed.PATCH  # the second row and column of patches in a cell of two by two
        loud[2, half:, half:] += 9
    else:
        merge = getattr(model, "spatial_merge_size", 1) if tower.row.merge else 1
        merge = int(given["merge_sizes"][0]) if "merge_sizes" in given else merge
        places = vision_utils.get_vision_position_ids(torch.tensor([grid]), merge)
        number = int(((places[:, 0] == row) & (places[:, 1] == column)).nonzero())
        (loud[0] if loud.shape[0] == 1 else loud)[number] += 9
    louder[next(iter(given))] = loud
    named = {"pixel_values": pixels, **{key: value for key, value in given.items() if isinstance(value, Tensor)}}

    def states(inputs: dict) -> Tensor:
        with observe(model, states=[0]) as seen, torch.no_grad():
            model(**inputs)
        return seen.states[0][:, tower.prefix :]

    moved = in_place((states(louder) - states(given)).norm(dim=-1), tower, named)[0]
    assert divmod(int(moved.argmax()), moved.shape[1]) == (row, column)
