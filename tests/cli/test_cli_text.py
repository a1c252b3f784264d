"""The commands that take text, on a planted language model with a tokenizer of its own on disk."""

import json
import re

import pytest
from commands import refused, run
from test_json import same
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import testreg
from testreg.demo.planted_text import START, WORDS, planted_text, text_for


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A checkpoint, a folder of text, and room."""
    folder = tmp_path_factory.mktemp("text")
    planted_text().model.save_pretrained(folder / "model")
    words = {f"w{index}": index for index in range(WORDS)} | {"<s>": START, "</s>": 61, "<pad>": 62, "<unk>": 63}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder / "model")
    (folder / "text").mkdir()
    for index, row in enumerate(text_for(30, 300, start=False)):
        (folder / "text" / f"{index:02}.txt").write_text(" ".join(f"w{word}" for word in row.tolist()))
    return folder


@pytest.fixture(scope="module")
def patched(places):
    result = run("patch", places / "model", "--text", places / "text", "--out", places / "clean")
    return places / "clean", result.stdout


def test_find(places):
    out = places / "plan.safetensors"
    said = run("find", places / "model", "--text", places / "text", "--explain", "--out", out).stdout
    assert "Neurons    2 at rest (block, neuron): (1, 5), (1, 9)" in said
    assert "100% of them are the first token" in said
    assert "begun otherwise: perplexity" in said
    assert "Plans tried; drift in nats a token, of the two beginnings the larger" in said
    assert "--text" in said.splitlines()[-1]
    assert testreg.RegisterPlan.load(out).pairs == ((1, 5), (1, 9))
    told = json.loads(run("find", places / "model", "--text", places / "text", "--json").stdout)
    same("find --text", told)
    assert told["neurons"] == {"1": [5, 9]}
    assert told["positions"] == "before"


def test_patch_saves_what_testreg_and_transformers_load(places, patched):
    directory, said = patched
    assert "With registers:" in said
    assert "model.generate(**inputs)" in said
    assert {"tokenizer.json", "generation_config.json"} <= {path.name for path in directory.iterdir()}
    ids = text_for(2, 40)
    model = testreg.load(directory)
    before = AutoModelForCausalLM.from_pretrained(places / "model")
    assert testreg.active(model).plan.pairs == ((1, 5), (1, 9))
    assert (model(ids[:, 1:]).logits - before(ids[:, 1:]).logits).abs().max() > 0.1
    with pytest.raises(Exception, match="this model has test-time registers that a stock class would lose"):
        type(before).from_pretrained(directory)


def test_inspect_before_and_after(places, patched):
    before = run("inspect", places / "model", "--text", places / "text").stdout
    after = run("inspect", patched[0], "--text", places / "text").stdout
    assert "Softmax sinks are there" in before
    assert "Patched: 2 registers get" in after
    assert json.loads(run("inspect", patched[0], "--text", places / "text", "--json").stdout)["registers"] == 2


def test_perplexity_by_arms(places, patched):
    out = places / "table.json"
    said = run("evaluate", patched[0], "--data", places / "text", "--task", "perplexity", "--limit", "4", "--out", out)
    same("evaluate --task perplexity", json.loads(out.read_text()))
    rows = {row["arm"]: row["value"] for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["unpatched", "start token in front", "prefix alone", "neurons at rest alone", "patched"]
    assert rows["patched"] < 1.02 * rows["unpatched"] < 0.2 * rows["neurons at rest alone"]
    assert "2044 tokens of" in said.stdout
    quantised = run("evaluate", patched[0], "--data", places / "text", "--task", "perplexity", "--limit", "2",
                    "--quantise", "w8a8", "--json").stdout  # fmt: skip
    rows = {row["arm"]: row for row in json.loads(quantised)["rows"]}
    assert rows["patched"]["setting"] == "w8a8 per channel"
    assert rows["patched"]["value"] < 1.3 * rows["unpatched, float"]["value"]


def test_a_window(places, patched):
    said = run("evaluate", patched[0], "--data", places / "text", "--task", "perplexity", "--window", "32",
               "--limit", "1000", "--json").stdout  # fmt: skip
    rows = {row["arm"]: row["value"] for row in json.loads(said)["rows"]}
    assert list(rows) == ["unpatched, window alone", "first 4 tokens kept", "patched"]
    assert rows["patched"] < 1.1 * rows["first 4 tokens kept"] < 0.5 * rows["unpatched, window alone"]


def test_report(places, patched):
    page = places / "report.html"
    run("report", patched[0], "--text", places / "text", "--out", page)
    shown = page.read_text()
    assert "2 attention registers" in shown
    assert shown.count("<img") == 8  # four heads before and after
    registers = re.findall(r"first token (\d+)%(?:, registers (\d+)%)?", shown)
    assert all(int(first) > 30 for first, _ in registers[0::2])
    assert all(int(first) < 10 < int(share) for first, share in registers[1::2])
    assert not re.search(r"(src|href)=.http", shown)
    run("report", places / "model", "--text", places / "text", "--out", page)
    assert page.read_text().count("<img") == 4


def test_stock_files(places, patched):
    said = run("export", patched[0], "--format", "stock", "--out", places / "stock").stdout
    assert "PeftModel.from_pretrained" in said
    assert (places / "stock" / "prefix" / "adapter_config.json").is_file()
    assert (places / "stock" / "tokenizer.json").is_file()
    told = run("export", places / "model", "--plan", places / "plan.safetensors", "--format", "stock", "--json",
               "--out", places / "other").stdout  # fmt: skip
    assert json.loads(told)["difference"] < 1e-4
    same("export --format stock, language model", json.loads(told))


def test_a_checkpoint_without_a_tokenizer(places):
    planted_text().model.save_pretrained(places / "bare")
    refused("find", places / "bare", "--text", places / "text", says=["no usable tokenizer", "pass --tokenizer NAME"])
    run("patch", places / "bare", "--text", places / "text", "--tokenizer", places / "model", "--out", places / "told")
    assert (places / "told" / "tokenizer.json").is_file()
    assert testreg.load(places / "told")(text_for(1, 40)).logits.shape == (1, 40, 64)


def test_what_does_not_go_together(places, patched):
    model, text = places / "model", places / "text"
    run("find", model, code=2)
    run("find", model, "--text", text, "--images", text, code=2)
    said = run("find", model, "--text", text, "--top-k", "3", "--workers", "2", code=2).stderr
    assert "--workers and --top-k go with --images, not with --text" in said
    assert "--tokenizer goes with --text" in run("find", model, "--images", text, "--tokenizer", model, code=2).stderr
    assert "--limit goes with --images" in run("report", model, "--text", text, "--limit", "3", code=2).stderr
    said = run("evaluate", model, "--data", text, "--task", "perplexity", "--side", "99", code=2).stderr
    assert "does not take --side" in said
    said = run("patch", model, "--plan", places / "plan.safetensors", "--out", places / "new", code=2).stderr
    assert "beside --plan too" in said
    refused("patch", model, "--text", text, "--out", patched[0], says="choose another, or pass --replace.")
    refused("find", model, "--text", places / "nowhere", says="there is no file or folder")
    run("evaluate", model, "--data", text, "--task", "outliers", "--window", "8", code=2)
    run("export", patched[0], "--format", "onnx", "--out", places / "x.onnx", code=2)
    refused("find", model, "--images", text, says=["is a text model", "text: --text FILE instead of --images."])
    (places / "empty").mkdir()
    refused("find", model, "--text", places / "empty", says="holds no text")
    (places / "short.txt").write_text("w1 w2 w3")
    refused("find", model, "--text", places / "short.txt", says="too short")
