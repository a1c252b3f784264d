"""`export --int8` and `evaluate --quantise` on the command line: what is said, and how it ends."""

import json

import pytest
import transformers
from commands import PROCESSOR, contents, noise, run

from testreg.cli import words
from testreg.demo.planted import plant

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SHAPE = {
    "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96,
    "image_size": 96, "patch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A planted checkpoint, and photos."""
    import torch

    folder = tmp_path_factory.mktemp("int8")
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SHAPE, num_labels=5)).eval()
    plant(model, decoys=False)
    model.save_pretrained(folder / "vit")
    transformers.ViTImageProcessor(**PROCESSOR).save_pretrained(folder / "vit")
    (folder / "photos").mkdir()
    for index in range(27):
        noise(index).save(folder / "photos" / f"{index:02d}.png")
    return folder


def refused(*given, says, code=1):
    """The one sentence that a command ends with."""
    said = run(*given, code=code).stderr.strip().splitlines()[-1]
    assert said.startswith("testreg: ")
    for part in [says] if isinstance(says, str) else says:
        assert part in said


def arguments(here, out, *more):
    return ("export", here / "vit", "--format", "onnx", "--int8", "--images", here / "photos", "--out", out, *more)


def test_one_command_does_it_all(here, tmp_path):
    out = tmp_path / "vit.onnx"
    told = json.loads(run(*arguments(here, out, "--json")).stdout)
    assert (told["calibrated"], told["images"], told["dtype"]) == (18, 9, "int8")
    assert told["sides"][-1]["size"] - out.stat().st_size < 20_000  # the norms are not in the file
    said = words.int8(told)
    assert said.startswith("Registers found on the photos to calibrate on: ")
    last = told["sides"][-1]
    assert f"patched, int8       {last['agreement']:>9.1%}  {last['cosine']:>7.4f}" in said
    assert f"on {told['processor']}" in said
    before = contents(tmp_path)
    refused(*arguments(here, out), says="exists")
    assert contents(tmp_path) == before


def test_harm_ends_with_four_and_names_the_layers(here, tmp_path, monkeypatch):
    monkeypatch.setattr("testreg.export.int8.LEAST", 1.1)
    says = ("has a cosine of", "in front of", "vit.layers.", "--keep", "--force")
    refused(*arguments(here, tmp_path / "vit.onnx"), says=says, code=4)
    assert contents(tmp_path) == {}


def test_options_that_do_not_go_together(here, tmp_path):
    out, photos = tmp_path / "vit.onnx", here / "photos"
    onnx = ("export", here / "vit", "--format", "onnx", "--out", out)
    assert "needs --images" in run(*onnx, "--int8", code=2).stderr
    assert "--target goes with --int8" in run(*onnx, "--target", "arm", code=2).stderr
    assert "does not take --library" in run(*arguments(here, out, "--library", "timm"), code=2).stderr
    judged = ("evaluate", here / "vit", "--data", photos, "--task", "agreement")
    assert "--per-channel goes with --quantise" in run(*judged, "--per-channel", code=2).stderr
    refused(*judged, "--quantise", "int3", says="no way to quantise")


def test_evaluate_in_few_bits(here):
    judged = ("evaluate", here / "vit", "--data", here / "photos", "--task", "agreement", "--limit", 15)
    table = json.loads(run(*judged, "--quantise", "w6a6", "--per-channel", "--even", "--json").stdout)
    assert table["provenance"]["quantised"] == "w6a6 per channel evened"
    assert {row["arm"] for row in table["rows"]} >= {"unpatched", "unpatched, w6a6 per channel evened"}
