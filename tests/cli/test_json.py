"""`--json`: the documented keys are those that the commands print, all of them and no others."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner
from PIL import Image

from testreg.cli.console import EXITS
from testreg.cli.group import main
from testreg.demo.planted import plant

PAGE = (Path(__file__).parents[2] / "docs" / "json.md").read_text(encoding="utf-8")
DTYPES = {"float64", "float32", "float16", "bfloat16"}
ASKED = (
    "--threshold",
    60,
    "--blocks",
    "1-4",
    "--top-k",
    2,
    "--registers",
    2,
    "--form",
    "dynamic",
    "--entry",
    1,
    "--size",
    64,
    "--size",
    5,
)


def documented(title):
    """The keys of a section, those of sections that it points to included."""
    section = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL).group(1)
    keys = set()
    for key, about in re.findall(r"^\| `(\S+)` \|(.*)\|$", section, re.MULTILINE):
        if key.endswith(".*"):
            (other,) = re.findall(r"\[(\w+)\]\(#\1\)", about)
            keys |= {key[:-1] + inner for inner in documented(other)}
        else:
            keys.add(key)
    return keys


def printed(value, path=""):
    """Paths of all that holds no further keys; what is null may hold some elsewhere."""
    if isinstance(value, dict) and value:
        return set().union(
            *(printed(inner, f"{path}.{kind(key, path)}" if path else key) for key, inner in value.items())
        )
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return set().union(*(printed(row, f"{path}[]") for row in value))
    return {path}


def kind(key, path):
    if path.endswith("settings"):
        return "NAME"
    return "BLOCK" if key.isdecimal() else "DTYPE" if key in DTYPES else key


def run(*arguments):
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def same(title, *documents):
    """Whether the keys of a section are those of one of the documents or another."""
    seen, known = set().union(*map(printed, documents)), documented(title)
    holders = {key for key in seen if any(other.startswith((f"{key}.", f"{key}[]")) for other in known)}  # null there
    assert seen - holders == known


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A planted checkpoint, photos, and registers for it."""
    folder = tmp_path_factory.mktemp("json")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=6, num_attention_heads=4, intermediate_size=96, image_size=96, patch_size=8
    )
    model = transformers.ViTForImageClassification(config).eval()
    plant(model, neurons=2)
    model.save_pretrained(folder / "vit")
    transformers.ViTImageProcessor(size={"height": 96, "width": 96}).save_pretrained(folder / "vit")
    (folder / "photos").mkdir()
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="module")
def plans(here):
    model = (here / "vit", "--images", here / "photos")
    return run("find", *model, "--out", here / "plan"), run("find", *model, *ASKED, "--force")


@pytest.fixture(scope="module")
def patched(here, plans):
    return run("patch", here / "vit", "--images", here / "photos", "--plan", here / "plan", "--out", here / "clean")


@pytest.fixture(scope="module")
def before(here):
    return run("inspect", here / "vit", "--images", here / "photos")


def test_every_command_is_documented():
    assert {title.split()[0] for title in re.findall(r"^## (.*)$", PAGE, re.MULTILINE)} == set(main.commands)


def test_exit_codes():
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    assert codes == {0, 1, 2, 130, *EXITS.values()}


def test_find(plans):
    same("find", *plans)


def test_inspect(before, patched):
    assert before["artefact"]
    same("inspect", before, patched["after"])


def test_patch_and_demo(here, plans, patched, before, monkeypatch, tmp_path):
    other = {"plan": plans[1], "after": before}
    same("patch", patched, other)
    monkeypatch.setattr("testreg.demo.demonstration.write", lambda out, replace: (here / "vit", here / "photos"))
    told = run("demo", "--out", tmp_path)
    assert (Path(told["picture"]).is_file(), Path(told["out"]).is_dir()) == (True, True)
    same("demo", told, other)


def test_inspect_text(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{index}": index for index in range(64)}, unk_token="w0")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1").save_pretrained(tmp_path)
    (tmp_path / "text").write_text(" ".join(f"w{index % 64}" for index in range(200)))
    same("inspect --text", run("inspect", tmp_path, "--text", tmp_path / "text"))


def test_evaluate(here, patched, tmp_path):
    arguments = ("evaluate", here / "clean", "--data", here / "photos", "--limit", 2, "--no-baselines", "--task")
    table = run(*arguments, "outliers", "--out", tmp_path / "table.json")
    assert json.loads((tmp_path / "table.json").read_text()) == table
    same("evaluate", table)
    assert printed(run(*arguments, "sinks")) <= documented("evaluate") | {"provenance.threshold"}


def test_files(here, patched, monkeypatch, tmp_path):
    same("show", run("show", here / "clean", here / "photos" / "00.png", "--out", tmp_path / "a.png"))
    same(
        "report", run("report", here / "clean", "--images", here / "photos", "--limit", 1, "--out", tmp_path / "a.html")
    )
    monkeypatch.setattr("testreg.export.onnx.export_onnx", lambda *arguments, **more: None)
    same("export --format onnx", run("export", here / "clean", "--format", "onnx", "--out", tmp_path / "a.onnx"))


def test_export_to_stock_weights(here, plans, patched, tmp_path):
    pytest.importorskip("timm")
    arguments = ("--format", "stock", "--images", here / "photos", "--out", tmp_path / "stock", "--force")
    same("export --format stock", run("export", here / "clean", *arguments), {"plan": plans[1]})
