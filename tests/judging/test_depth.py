"""Depth from a linear probe: on a planted model of photos whose depth is known, and what depth maps have to be."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from commands import PROCESSOR, run
from growing import bare, grown
from PIL import Image
from transformers import ViTImageProcessorPil

from testreg import BadImages, RegisterPlan, metrics
from testreg.images import labels
from testreg.judging.evaluation import evaluate
from testreg.judging.tasks import Depth

NEAR, FAR = 2.0, 6.0
SETTINGS = {"side": 96, "bins": 16}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Black photos, all of each 2 m away, and white ones, 6 m."""
    folder = tmp_path_factory.mktemp("depth")
    for part in ("photos", "depths"):
        (folder / part).mkdir()
    for index in range(16):
        far = index // 2 % 2
        Image.new("RGB", (96, 96), "white" if far else "black").save(folder / "photos" / f"{index:02}.png")
        depth = np.full((96, 96), 1000 * (FAR if far else NEAR), np.uint16)
        depth[:, :7] = 0  # not known
        Image.fromarray(depth).save(folder / "depths" / f"{index:02}.png")
    return folder


def judged(model, data, plan=None):
    table = evaluate(model, data, Depth(**SETTINGS), plan=plan, processor=ViTImageProcessorPil(**PROCESSOR))
    return table, {row.arm: row.value for row in table}


def test_known_depths_are_found_exactly_where_nothing_spoils_the_patches(data):
    table, values = judged(bare(), data)
    assert values["unpatched"] == pytest.approx(0, abs=0.01)
    assert values["floor"] == pytest.approx((FAR - NEAR) / 2)  # half of the photos are as far away
    row = table.of("unpatched")
    assert (row.unit, row.images, row.metric) == ("m", 8, "RMSE")
    assert "3 seeds, spread 0.00" in row.setting
    assert row.low <= row.value <= row.high


def test_outliers_spoil_depths_and_registers_mend_them(data):
    model, planted = grown(where="corners")
    table, values = judged(model, data, RegisterPlan(planted.neurons, registers=1))
    assert values["patched"] == pytest.approx(0, abs=0.03)
    assert values["patched"] < 0.75 * values["unpatched"]
    assert table.of("patched").difference_high < 0
    assert "random neurons instead" in values


def test_a_probe_learns_from_known_depths_alone_and_the_seed_decides_all():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(16, 3, 6, 6, generator=generator)
    features[:, 0] = features[:, 0].sign()
    depths = 4 + 2 * features[:, 0]
    holes = torch.where(torch.rand(16, 6, 6, generator=generator) < 0.3, 0.0, depths)
    probe = metrics.depth_probe(features, holes, bins=8)
    with torch.no_grad():
        assert metrics.rmse(probe(features)[:, 0], depths) < 0.3  # of 4 m between the two
        assert torch.equal(metrics.depth_probe(features, holes, bins=8)(features), probe(features))
        assert not torch.equal(metrics.depth_probe(features, holes, bins=8, seed=1)(features), probe(features))
        assert probe(10 * features).min() >= 2
        assert probe(10 * features).max() <= 6


def test_rmse_is_of_known_pixels():
    found, true = torch.tensor([[1.0, 2.0], [3.0, 9.0]]), torch.tensor([[1.0, 5.0], [7.0, 0.0]])
    assert metrics.rmse(found, true) == pytest.approx(((9 + 16) / 3) ** 0.5)


def test_a_depth_map_is_millimetres_in_16_bits(tmp_path):
    def sample(values):
        Image.fromarray(values).save(tmp_path / "depth.png")
        return labels.Sample(tmp_path / "photo.jpg", depth=tmp_path / "depth.png")

    true = sample(np.array([[0, 1500], [65535, 7]], np.uint16)).read_depth()
    assert torch.equal(true, torch.tensor([[0, 1.5], [65.535, 0.007]]))
    with pytest.raises(BadImages, match=r"type uint8; one depth per pixel in millimetres is needed"):
        sample(np.ones((2, 2), np.uint8)).read_depth()
    with pytest.raises(BadImages, match="one depth per pixel in millimetres is needed"):
        sample(np.ones((2, 2, 3), np.uint8)).read_depth()
    with pytest.raises(BadImages, match="knows no depth"):
        sample(np.zeros((2, 2), np.uint16)).read_depth()
    with pytest.raises(BadImages, match="cannot be read"):
        labels.Sample(tmp_path / "photo.jpg", depth=tmp_path / "none.png").read_depth()


def test_photos_without_depths_are_told_what_is_needed(data, tmp_path):
    assert [sample.path.parent.name for sample in labels.deep(data)] == ["photos"] * 16
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(BadImages, match="a folder depths/ with a PNG of millimetres for each photo"):
        labels.deep(tmp_path)
    with pytest.raises(BadImages, match="two or more"):
        evaluate(bare(), data, Depth(**SETTINGS), processor=ViTImageProcessorPil(**PROCESSOR), limit=1)


def test_the_command_line(data, tmp_path):
    bare().save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(**PROCESSOR).save_pretrained(tmp_path / "vit")
    given = ("evaluate", tmp_path / "vit", "--data", data, "--task", "depth", "--side", "96")
    rows = json.loads(run(*given, "--json").stdout)["rows"]
    assert rows[0]["metric"] == "RMSE"
    assert rows[0]["value"] == pytest.approx(0, abs=0.02)
    assert " m [" in run(*given, "--limit", "8").stdout
    assert "does not take --foreground" in run(*given, "--foreground", "1-2", code=2).output


def test_depths_go_with_the_photo_of_their_own_folder(tmp_path):
    def made(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("I;16" if "depths" in name else "RGB", (4, 4)).save(tmp_path / name)

    made("a/1.jpg", "b/1.jpg", "depths/a/1.png", "depths/b/1.png", "rooms/photos/2.jpg", "rooms/depths/2.png")
    found = {str(one.path.relative_to(tmp_path)): one.depth for one in labels.deep(tmp_path)}
    assert found["a/1.jpg"] == tmp_path / "depths/a/1.png"
    assert found["b/1.jpg"] == tmp_path / "depths/b/1.png"
    assert found["rooms/photos/2.jpg"] == tmp_path / "rooms/depths/2.png"  # of a name that no other has
    made("c/1.jpg")
    assert tmp_path / "c/1.jpg" not in [one.path for one in labels.deep(tmp_path)]  # the others' are not its own
    made("depths/d/1.png", "depths/e/1.png")
    with pytest.raises(BadImages, match=r"1.jpg may go with .*1.png or .*1.png"):
        labels.deep(tmp_path)
