"""The commands `evaluate`, `report` and `show`."""

import csv
import json

import numpy as np
import pytest
import torch
import zoo
from click.testing import CliRunner
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from testreg import RegisterPlan
from testreg.cli.group import main
from testreg.cli.judging import PERPLEXITY, TASKS
from testreg.judging.tasks import TASKS as KNOWN


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A checkpoint, a plan for it, and photos with masks."""
    folder = tmp_path_factory.mktemp("judging")
    zoo.build("ViTForImageClassification")[0].save_pretrained(folder / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "model")
    RegisterPlan({1: (3, 5)}, registers=2, entry=1, state=torch.ones(zoo.CHANNELS)).save(folder / "plan")
    generator = np.random.default_rng(0)
    for index in range(3):
        for place, shape in (("images", (40, 40, 3)), ("masks", (40, 40))):
            (folder / "data" / place).mkdir(parents=True, exist_ok=True)
            high = 255 if place == "images" else 3
            Image.fromarray(generator.integers(0, high, shape, dtype=np.uint8)).save(
                folder / "data" / place / f"{index}.png"
            )
    return folder


def ask(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_tasks_of_the_command_are_the_packages():
    assert set(TASKS) == {*KNOWN, PERPLEXITY}


def test_evaluate_prints_a_table_and_writes_it(here):
    files = here / "table.json", here / "table.csv"
    result = ask(
        "evaluate", here / "model", "--plan", here / "plan", "--data", here / "data", "--task", "attention",
        "--side", 32, "--foreground", "2-2", "--out", files[0], "--out", files[1], "--against", here / "model",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for text in ("unpatched", "patched", "random neurons instead", "floors", str(here / "model"), "3 photos"):
        assert text in result.output
    assert "An outlier has 4.0 times the median norm of an image or more (no plan says otherwise)." in result.output
    kept = json.loads(files[0].read_text())
    assert kept["provenance"]["settings"] == {"side": 32, "foreground": [2]}
    with files[1].open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(kept["rows"])
    same = [row for row in kept["rows"] if row["arm"] == str(here / "model")]
    assert all(row["difference"] == 0 for row in same)


def test_evaluate_as_json_is_the_table(here):
    result = ask("evaluate", here / "model", "--data", here / "data", "--task", "outliers", "--limit", 2, "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert {row["arm"] for row in values["rows"]} == {"unpatched"}
    assert values["provenance"]["images"] == 2


def test_a_model_without_registers_gets_a_verdict(here):
    result = ask("evaluate", here / "model", "--data", here / "data", "--task", "agreement")
    assert result.exit_code == 0, result.output
    assert "nothing to patch" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--task", "agreement", "--sweep"), 2, "--sweep"),
        (("--task", "attention", "--foreground", "x"), 2, "FIRST-LAST"),
        (("--task", "attention", "--foreground", "5-1"), 2, "FIRST-LAST"),
        (("--task", "discovery"), 1, "boxes"),
        (("--task", "agreement", "--out", "missing/table.json"), 1, "cannot be written"),
    ],
)
def test_wrong_questions_end_in_one_sentence(here, arguments, code, says):
    result = ask("evaluate", here / "model", "--data", here / "data", *arguments)
    assert result.exit_code == code
    assert says in result.output
    assert "Traceback" not in result.output


def test_report_writes_a_page(here):
    page = here / "report.html"
    result = ask("report", here / "model", "--plan", here / "plan", "--images", here / "data/images", "--out", page)
    assert result.exit_code == 0, result.output
    assert page.read_text().startswith("<!doctype html>")
    assert str(page) in result.output
    result = ask("report", here / "model", "--images", here / "data/images", "--out", here, "--json")
    assert result.exit_code == 1
    assert "cannot be written" in result.output
