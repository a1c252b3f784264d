"""`testreg demo`: the main job in a fresh folder, offline, and plainly a demonstration."""

import json
import re
import sys

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from transformers import ViTForImageClassification

import testreg
from testreg.cli.group import main
from testreg.demo.demonstration import PHOTOS, demo_model, demo_photos

pytest.importorskip("skimage")


def run(*arguments):
    return CliRunner().invoke(main, ["demo", *map(str, arguments)])


@pytest.fixture(scope="module")
def planted():
    """The demonstration's model and what was planted in it, made here."""
    return demo_model()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A demonstration, which made its model itself."""
    folder = tmp_path_factory.mktemp("fresh") / "demo"
    return folder, run("--out", folder)


def test_it_says_what_it_is_and_what_comes_next(made):
    folder, result = made
    assert result.exit_code == 0, result.output
    first = " ".join(result.stdout.split())[:600]
    assert "demonstration" in first
    assert "artefact was planted" in first
    assert "real ones, from scikit-image" in first
    assert "-> 0.00%" in result.stdout
    assert f"Picture in {folder / 'before_after.png'}." in result.stdout
    assert "testreg patch MODEL --images PHOTOS --out DIRECTORY" in result.stdout


def test_the_planted_neurons_are_those_that_are_found(made, planted):
    folder, _ = made
    found = testreg.active(testreg.load(folder / "patched")).plan.neurons
    assert found == planted[1].neurons


def test_the_saved_model_has_no_outliers_and_the_planted_one_has(made):
    folder, _ = made
    photos = demo_photos(16, seed=7)  # crops of no calibration
    for photo, name in zip(photos, range(16), strict=True):
        photo.save(folder.parent / f"{name}.png")
    files = sorted(folder.parent.glob("*.png"))
    assert testreg.inspect(ViTForImageClassification.from_pretrained(folder / "planted-vit"), files).artefact
    seen = testreg.inspect(testreg.load(folder / "patched"), files)
    assert seen.artefact is None
    assert max(seen.ratios) < 3


def test_the_picture_is_one(made):
    folder, _ = made
    with Image.open(folder / "before_after.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert all(500 < side < 5000 for side in picture.size)
        assert len(set(picture.convert("RGB").resize((50, 50)).get_flattened_data())) > 100


@pytest.mark.parametrize("flag", ["--replace", "--force"])
def test_again_where_that_is_said_only(made, planted, monkeypatch, flag):
    folder, _ = made
    monkeypatch.setattr("testreg.demo.demonstration.demo_model", lambda: planted)
    again = run("--out", folder)
    assert again.exit_code == 1
    assert re.fullmatch(r"testreg: .* is not empty: .*--out.*--replace\.\n", again.stderr)
    forced = run("--out", folder, flag, "--json")
    values = json.loads(forced.stdout)
    assert set(values) == {"model", "photos", "picture", "out", "plan", "after"}
    assert values["after"]["artefact"] is None
    assert values["plan"]["provenance"]["after"]["outlier_patches"] == 0


def test_replace_takes_no_other_folder(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    result = run("--out", tmp_path, "--replace")
    assert result.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_without_scikit_image_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    result = run("--out", tmp_path / "demo")
    assert result.exit_code == 1
    assert "pip install 'testreg[demo]'" in result.stderr
    assert not list(tmp_path.rglob("*.*"))


def test_the_same_seed_gives_the_same_model_and_its_head_knows_the_photos(made, planted):
    one, two = planted[0], ViTForImageClassification.from_pretrained(made[0] / "planted-vit")
    assert all(torch.equal(left, right) for left, right in zip(one.parameters(), two.parameters(), strict=True))
    assert list(one.config.id2label.values()) == list(PHOTOS)
