"""The script of the paper's rows, tried on small models with a planted artefact in the place of its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from commands import noise
from PIL import Image

from testreg.demo.planted import plant
from tests.benchmarks import paper

SHAPE = {
    "hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 96,
    "image_size": 96, "patch_size": 8,
}  # fmt: skip


@pytest.fixture
def here(tmp_path) -> Path:
    torch.manual_seed(0)
    model = hf.ViTModel(hf.ViTConfig(**SHAPE)).eval()
    plant(model, where="corners")
    model.save_pretrained(tmp_path / "vit")
    hf.ViTImageProcessorPil(size={"height": 96, "width": 96}).save_pretrained(tmp_path / "vit")
    (tmp_path / "nyud" / "depths").mkdir(parents=True)
    for index in range(3):
        Image.fromarray(np.full((96, 96), 1000 + index, np.uint16)).save(tmp_path / "nyud" / "depths" / f"{index}.png")
    for part in ("photos", "classes/a", "classes/b", "boxes", "nyud/photos"):
        (tmp_path / part).mkdir(parents=True)
        for index in range(12 if part == "photos" else 3):
            noise(index).save(tmp_path / part / f"{index}.png")
    annotations = [{"image_id": index, "bbox": [8, 8, 40, 40], "iscrowd": 0} for index in range(3)]
    images = [{"id": index, "file_name": f"{index}.png"} for index in range(3)]
    (tmp_path / "boxes" / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    Image.new("RGB", (8, 8)).save(tmp_path / "empty.png")
    return tmp_path


def test_rows_are_measured_beside_what_is_reported_and_go_on_where_they_stopped(here, capsys):
    given = ["--calibration", here / "photos", "--dinov2", here / "vit", "--find-all", "--out", here / "paper.md"]
    paper.main([*map(str, given), "--imagenet", str(here / "classes")])
    text = (here / "paper.md").read_text()
    done = json.loads((here / "paper.json").read_text())
    found = done["DINOv2-L, ImageNet, top-1"]
    assert {"unpatched", paper.PATCHED, paper.AUTO, "random neurons instead", paper.BARE} <= found.keys()
    assert all(0 <= value <= 100 for value, _, _ in found.values())
    row = f"| DINOv2-L, ImageNet, top-1 | unpatched | 86.4 | {found['unpatched'][0]:.1f} |"
    assert row in text
    assert done["DINOv2-L, LOST CorLoc, VOC07"] == "not run: no --voc07"
    assert "| OpenCLIP B/16, zero-shot segmentation, mIoU | as published | 40.0 | not run: no --openclip |" in text

    shutil.rmtree(here / "classes")  # what is there is not measured again
    paper.main([*map(str, given), "--imagenet", str(here / "classes"), "--voc07", str(here / "boxes")])
    again = json.loads((here / "paper.json").read_text())
    assert again["DINOv2-L, ImageNet, top-1"] == found
    assert set(again["DINOv2-L, LOST CorLoc, VOC07"]) >= {"unpatched", paper.PATCHED, paper.AUTO}
    assert "in " in capsys.readouterr().out


def test_depth_is_a_row_in_metres(here, monkeypatch):
    (row,) = (row for row in paper.ROWS if row.data == "nyud")
    assert (row.task.side, row.task.seeds, row.task.bins) == (518, 3, 256)
    small = replace(row, task=replace(row.task, side=96, steps=20))  # or it takes minutes here
    monkeypatch.setattr(paper, "ROWS", (small,))
    given = ["--calibration", here / "photos", "--dinov2", here / "vit", "--find-all", "--out", here / "paper.md"]
    paper.main([*map(str, given), "--nyud", str(here / "nyud")])
    name = "DINOv2-L, linear depth, NYUd, RMSE in m"
    found = json.loads((here / "paper.json").read_text())[name]
    assert {"unpatched", paper.PATCHED, paper.AUTO, "random neurons instead", paper.BARE} <= found.keys()
    assert all(0 <= value <= 0.002 for value, _, _ in found.values())  # all depths lie between 1 and 1.002 m
    assert f"| {name} | unpatched | 0.388 | {found['unpatched'][0]:.3f} |" in (here / "paper.md").read_text()


def test_a_row_that_fails_says_why_and_the_others_go_on(here):
    given = ["--calibration", here / "photos", "--dinov2", here / "vit", "--find-all", "--out", here / "paper.md"]
    paper.main([*map(str, given), "--voc07", str(here / "nowhere"), "--voc12", str(here / "boxes")])
    done = json.loads((here / "paper.json").read_text())
    assert done["DINOv2-L, LOST CorLoc, VOC07"].startswith("failed: BadImages")
    assert isinstance(done["DINOv2-L, LOST CorLoc, VOC12"], dict)


def test_published_neurons_are_as_many_as_published():
    assert sum(map(len, paper.DINOV2_NEURONS.values())) == 45
    assert {block: len(row) for block, row in paper.DINOV2_NEURONS.items()} == {
        17: 17,
        16: 9,
        15: 9,
        14: 8,
        13: 1,
        12: 1,
    }
    assert all(neuron < 4096 for row in paper.DINOV2_NEURONS.values() for neuron in row)
