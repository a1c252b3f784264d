"""The census: rows with known answers, a row for what fails, resumption, and tables that come back as they went."""

from __future__ import annotations

import csv
import json
import re
import shutil

import pytest
import torch
import transformers
from commands import run
from PIL import Image

import testreg
from testreg.demo.planted import plant
from testreg.judging import census as module
from testreg.judging.census import census, markdown
from testreg.judging.census_table import COLUMNS, TABLES, read, write
from testreg.runtime.errors import TestregError

SHAPE = {
    "hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 96,
    "image_size": 96, "patch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Photos, a planted model, a clean one, and a broken one."""
    folder = tmp_path_factory.mktemp("census")
    (folder / "photos").mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(8):
        pixels = torch.randint(0, 256, (96, 96, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "photos" / f"{index}.png")
    processor = transformers.ViTImageProcessorPil(size={"height": 96, "width": 96})
    for name in ("planted", "clean"):
        torch.manual_seed(0)
        model = transformers.ViTModel(transformers.ViTConfig(**SHAPE)).eval()
        if name == "planted":
            plant(model, where="corners")
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    return folder


def models(here, *names):
    return [str(here / name) for name in names]


def load(name):
    return testreg.checkpoints.load_base(name)


def test_a_row_says_what_inspect_says(here):
    rows = census(models(here, "planted", "clean"), here / "photos", load=load)
    seen = testreg.inspect(load(str(here / "planted")), here / "photos")
    planted, clean = rows
    assert planted["verdict"] == "artefact"
    assert planted["outliers"] == seen.artefact.share == pytest.approx(4 / 144)
    assert (planted["where"], planted["states"], planted["block"]) == ("position", 1, seen.artefact.block)
    assert planted["values"] == pytest.approx(seen.nature.values)
    assert planted["attention"] == pytest.approx(seen.nature.attention)
    assert planted["times"] == seen.ratios[seen.artefact.shown]
    assert (clean["verdict"], clean["outliers"], clean["where"], clean["reason"]) == ("none", None, None, None)
    assert planted["photos"].startswith("8 (")


def test_one_that_fails_is_a_row_with_its_reason_and_the_others_are_there(here):
    rows = census(models(here, "broken", "nowhere", "planted"), here / "photos", load=load)
    assert [row["verdict"] for row in rows] == ["failed", "failed", "artefact"]
    assert "config.json" in rows[0]["reason"]
    assert "nowhere" in rows[1]["reason"]
    assert all(len(row["reason"]) <= module.LONGEST + 3 for row in rows[:2])


def test_several_sizes(here):
    rows = census(models(here, "planted"), here / "photos", load=load, sizes=(None, 48, 192))
    assert [row["size"] for row in rows] == ["own", "48", "192"]
    assert rows[0]["outliers"] == pytest.approx(4 / 144)
    seen = testreg.inspect(load(str(here / "planted")), here / "photos", **module.at(load(str(here / "planted")), 192))
    assert rows[2]["outliers"] == (seen.artefact.share if seen.artefact else None)
    (clean,) = census(models(here, "planted"), here / "photos", load=load, sizes=(3,))
    assert clean["verdict"] == "failed"  # no patch fits into it


@pytest.mark.parametrize("ending", TABLES)
def test_it_goes_on_where_it_stopped(here, tmp_path, ending):
    out, loaded = tmp_path / f"census{ending}", []

    def counting(name):
        loaded.append(name.split("/")[-1])
        if len(loaded) == 3:
            raise KeyboardInterrupt
        return load(name)

    everyone = models(here, "planted", "broken", "clean")
    with pytest.raises(KeyboardInterrupt):
        census(everyone, here / "photos", load=counting, out=out)
    assert [row["verdict"] for row in read(out)] == ["artefact", "failed"]
    rows = census(everyone, here / "photos", load=counting, out=out)
    assert loaded == ["planted", "broken", "clean", "broken", "clean"]  # what failed is tried again
    assert [row["verdict"] for row in rows] == ["artefact", "failed", "none"]
    assert float(rows[0]["outliers"]) == pytest.approx(4 / 144, abs=5e-5)
    before = out.read_bytes()
    assert len(census(models(here, "clean", "planted"), here / "photos", load=counting, out=out)) == 3
    assert loaded[5:] == []
    assert out.read_bytes() == before


def test_what_is_asked_for_otherwise_is_looked_at_again(here, tmp_path, monkeypatch):
    out = tmp_path / "census.md"
    (planted,) = models(here, "planted")
    (first,) = census([planted], here / "photos", load=load, out=out)
    (own,) = census([f"{planted}/"], here / "photos", load=load, out=out, threshold=1e6)
    assert (first["verdict"], own["verdict"]) == ("artefact", "none")
    (back,) = census([planted], here / "photos", load=load, out=out)
    assert back["verdict"] == "artefact"

    def gone(*_, **__):
        raise testreg.BadPlan("the hub is gone")

    monkeypatch.setattr(module, "has_plan", gone)
    told = []
    (row,) = census([planted], here / "photos", load=load, out=out, plans=("owner/name",), tell=told.append)
    assert (row["verdict"], row["plan"]) == ("artefact", None)
    assert "the hub is gone" in told[-1]


def test_other_photos_are_other_rows(here, tmp_path):
    (tmp_path / "few").mkdir()
    for index in range(2):
        (tmp_path / "few" / f"{index}.png").write_bytes((here / "photos" / f"{index}.png").read_bytes())
    out = tmp_path / "census.json"
    census(models(here, "planted"), here / "photos", load=load, out=out)
    rows = census(models(here, "planted"), tmp_path / "few", load=load, out=out)
    assert [row["photos"][0] for row in rows] == ["8", "2"]
    assert [row["where"] for row in rows] == ["position", "unknown"]


def test_tables_come_back_as_they_went(tmp_path):
    row = dict.fromkeys(COLUMNS)
    row |= {"model": "a|b", "size": "own", "photos": "8 (0)", "verdict": "artefact", "outliers": 0.0201, "times": 50.04}
    row |= {"threshold": "3.4 times the median norm of an image", "native": 0}
    write([row], tmp_path / "t.json")
    assert read(tmp_path / "t.json") == [row]
    write([row], tmp_path / "t.csv")
    (back,) = read(tmp_path / "t.csv")
    assert back == {**row, "native": 0}
    assert next(csv.reader((tmp_path / "t.csv").read_text().splitlines())) == list(COLUMNS)
    text = markdown([row])
    assert text.splitlines() == [
        "| model | size | artefact? | outliers | largest / median | threshold | photos |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        r"| a\|b | own | artefact | 2.01 % | 50 | 3.4 × median | 8 (0) |",
    ]


ODD = [
    "a|b", "a | b", "|", "a\\", "a\\|b", "-", "a,b", 'a "b", c', "é/模型 🤖", "two  spaces", " before and after ",
    "a\nb", "a\r\nb\tc", "a\u2028b", "&lt;b&gt; & &#38;", "<b>bold</b>", "1e5", "3 × median", "\udce9 is no UTF-8", "'",
]  # fmt: skip


@pytest.mark.parametrize("ending", [*TABLES, ".MD"])
def test_what_a_model_is_called_comes_back_as_it_went(tmp_path, ending):
    rows = [
        {**dict.fromkeys(COLUMNS), "model": name, "size": "own", "photos": "8 (0)", "verdict": "failed", "reason": name}
        for name in ODD
    ]
    for _ in range(2):  # as a table that is taken up again
        write(rows, tmp_path / f"t{ending}")
        assert read(tmp_path / f"t{ending}") == rows
    if ending == ".MD":
        lines = (tmp_path / "t.MD").read_text(encoding="utf-8", errors="surrogateescape").split("\n")
        assert len(lines) == 2 + len(rows) + 1
        assert all(
            len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 6 for line in lines[:-1]
        )  # as GitHub tells cells apart


def test_a_table_that_a_spreadsheet_saved_is_read(tmp_path):
    row = {"model": "é", "size": "own", "photos": "8 (0)", "verdict": "none", "times": 2.5}
    write([row], tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "t.csv").read_bytes())
    assert read(tmp_path / "t.csv") == [{**dict.fromkeys(COLUMNS), **row}]


def test_a_model_of_an_odd_name_is_not_looked_at_twice(here, tmp_path):
    odd = tmp_path / "a | b, é"
    shutil.copytree(here / "planted", odd)
    loaded = []
    for ending in TABLES * 2:
        out = tmp_path / f"t{ending}"
        rows = census([f"{odd}/"], here / "photos", load=lambda name: loaded.append(name) or load(name), out=out)
        assert [row["model"] for row in rows] == [str(odd)]
    assert len(loaded) == len(TABLES)
    said = run("inspect", f"{odd}/", "--images", here / "photos", "--out", tmp_path / "t.csv", "--json").stdout
    assert [row["verdict"] for row in json.loads(said)] == ["artefact"]


def test_another_dtype_and_another_processor_are_other_rows(here, tmp_path):
    out, name = tmp_path / "t.md", here / "planted"

    def look(*more):
        given = ("inspect", name, "--images", here / "photos", "--out", out, "--json", *more)
        result = run(*given)
        rows = json.loads(result.stdout)
        return "looking at" in result.stderr, [(row["size"], row["dtype"], row["processor"]) for row in rows]

    own, half = ("own", None, None), ("own", "bfloat16", None)
    grey = ("own", None, "96:0.5:0.5")
    assert look() == (True, [own])
    assert look() == (False, [own])
    assert look("--dtype", "bfloat16") == (True, [own, half])
    assert look("--processor", "96:0.5:0.5") == (True, [own, half, grey])
    assert look("--processor", "48:0.5:0.5") == (True, [own, half, grey, ("own", None, "48:0.5:0.5")])
    assert not any(look(*more)[0] for more in ((), ("--dtype", "bfloat16"), ("--processor", "96:0.5:0.5")))
    assert "| bfloat16 | - |" in out.read_text()


def test_a_processor_that_is_given_loaded_is_known_by_its_settings_and_keeps_them_at_other_sizes(here, tmp_path):
    def made(mean):
        size = {"height": 96, "width": 96}
        return transformers.ViTImageProcessorPil(size=size, image_mean=[mean] * 3, image_std=[0.5] * 3)

    out, loaded = tmp_path / "t.json", []

    def look(mean, size=None):
        return census(
            models(here, "planted"), here / "photos", load=lambda name: loaded.append(name) or load(name), out=out,
            sizes=(size,), processor=made(mean),
        )  # fmt: skip

    for mean in (0.5, 0.5, 0.1, 0.5):
        look(mean)
    assert len(loaded) == 2
    row = look(0.1, 192)[-1]
    model = load(str(here / "planted"))
    seen = testreg.inspect(model, here / "photos", processor=module.at_side(made(0.1), 192))
    own = testreg.inspect(model, here / "photos", **module.at(model, 192))
    assert row["times"] == (seen.ratios[seen.artefact.shown] if seen.artefact else max(seen.ratios))
    assert row["times"] != (own.ratios[own.artefact.shown] if own.artefact else max(own.ratios))


@pytest.mark.parametrize(
    ("name", "content"),
    [("t.json", "[1]"), ("t.json", "{"), ("t.csv", "a,b\n1,2\n"), ("t.csv", 'a,"b'), ("t.md", "# My notes\n"),
     ("t.md", ""), ("t.md", "| a | b |\n| --- | --- |\n| 1 | 2 |\n")],
)  # fmt: skip
def test_what_is_no_census_is_not_written_over(here, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(TestregError, match="holds no census, so nothing was written"):
        census(models(here, "clean"), here / "photos", load=load, out=tmp_path / name)
    assert (tmp_path / name).read_text() == content


def test_a_plan_that_exists_is_named(here, monkeypatch):
    monkeypatch.setattr(module, "has_plan", lambda model, plans: f"{plans[0]}:vit.safetensors")
    (row,) = census(models(here, "planted"), here / "photos", load=load, plans=("me/plans",))
    assert row["plan"] == "me/plans:vit.safetensors"


def test_the_command_line(here, tmp_path):
    out = tmp_path / "census.md"
    said = run("inspect", *models(here, "planted", "broken"), "--images", here / "photos", "--out", out).output
    assert f"Table in {out}." in said
    assert out.read_text().count("\n") == 4
    said = run("inspect", here / "planted", here / "clean", "--images", here / "photos", "--json").stdout
    assert [row["verdict"] for row in json.loads(said)] == ["artefact", "none"]
    said = run("inspect", here / "broken", "--images", here / "photos", "--out", tmp_path / "b.csv", code=1).output
    assert "none of the models could be looked at" in said
    assert run("inspect", here / "clean", "--images", here / "photos", "--out", tmp_path / "b.txt", code=1)
    assert run("inspect", here / "clean", here / "planted", "--text", here / "none.txt", code=2)
    at = json.loads(run("inspect", here / "planted", "--images", here / "photos", "--size", "192", "--json").stdout)
    assert at["family"] == "vit"
