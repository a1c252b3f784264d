"""The command line: what it prints, what it refuses, how it ends, and that bad input loses nothing."""

import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from commands import PHOTOS, PROCESSOR, SHAPE, checkpoint, classifier, contents, noise, refused, run
from forks import MODULE
from PIL import Image
from safetensors.torch import load_file, save_file

import testreg
from testreg.cli import console
from testreg.cli import finding as cli
from testreg.cli import words as text
from testreg.cli.group import main
from testreg.demo.planted import plant


@pytest.fixture(autouse=True)
def _no_bars():
    """As commands start: transformers reads its settings once, when it is imported, and here it is already."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint with planted register neurons."""
    planted = classifier()
    plant(planted, neurons=2)
    return checkpoint(tmp_path_factory.mktemp("planted") / "vit", planted)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A checkpoint without the artefact."""
    return checkpoint(tmp_path_factory.mktemp("healthy") / "vit", classifier())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for index in range(PHOTOS):
        noise(index).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="module")
def found(model, photos, tmp_path_factory):
    """A plan that `find` wrote, and what it said."""
    file = tmp_path_factory.mktemp("plan") / "plan.safetensors"
    return file, run("find", model, "--images", photos, "--out", file, "--explain").stdout


@pytest.fixture(scope="module")
def clean(model, photos, found, tmp_path_factory):
    """A patched checkpoint that `patch` wrote, and what it said."""
    folder = tmp_path_factory.mktemp("clean") / "vit"
    return folder, run("patch", model, "--images", photos, "--plan", found[0], "--out", folder).stdout


# What is printed


def test_patch_tells_what_a_person_wants_to_know(model, clean, photos):
    folder, said = clean
    plan = testreg.load(folder)
    neurons = testreg.active(plan).plan.pairs
    assert ", ".join(f"({block}, {neuron})" for block, neuron in neurons) in said
    for part in ("Artefact", "Neurons", "Registers", "unpatched", "patched", "Held out", "-> 0.00%", "same top-1",
                 "cosine of the output", f'model = testreg.load("{folder}")'):  # fmt: skip
        assert part in said
    table = [line for line in said.splitlines() if re.match(r" *\d+  ", line)]  # a line per block
    assert len(table) == SHAPE["num_hidden_layers"]
    assert len({len(line) for line in table}) == 1  # aligned
    assert all(line == line.rstrip() for line in said.splitlines())


def test_the_lines_that_patch_prints_load_the_patched_model(clean, photos):
    _, said = clean
    code = "\n".join(line[4:] for line in said.split("Load it:")[1].splitlines())
    pixels = transformers.ViTImageProcessor(**PROCESSOR)(noise(3), return_tensors="pt")
    given = {"inputs": pixels}
    with torch.no_grad():
        exec(code, given)
    assert testreg.active(given["model"]) is not None
    assert given["outputs"].logits.shape == (1, 5)


def test_json_is_one_document_and_nothing_else(model, photos, clean, found, tmp_path):
    values = json.loads(run("patch", model, "--images", photos, "--out", tmp_path / "a", "--json").stdout)
    assert set(values) == {"out", "plan", "after"}
    told = values["plan"]["provenance"]
    assert told["before"]["outlier_patches"] > 0.005
    assert told["after"]["outlier_patches"] == 0 == values["after"]["blocks"][-1]["share"]
    assert {(row["block"], row["neuron"]) for row in told["candidates"][:2]} == {
        (int(block), neuron) for block, row in values["plan"]["neurons"].items() for neuron in row
    }

    values = json.loads(run("find", model, "--images", photos, "--json").stdout)
    assert values["neurons"] == testreg.RegisterPlan.load(found[0]).to_dict()["neurons"]

    values = json.loads(run("inspect", model, "--images", photos, "--json").stdout)
    assert values["artefact"]
    assert len(values["blocks"]) == SHAPE["num_hidden_layers"]
    values = json.loads(run("inspect", clean[0], "--images", photos, "--json").stdout)
    assert values["artefact"] is None

    picture = tmp_path / "p.png"
    values = json.loads(run("show", clean[0], photos / "00.png", "--out", picture, "--json").stdout)
    assert values == {"picture": str(picture)}
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
        assert min(drawn.size) > 200

    arguments = ("--data", photos, "--task", "outliers", "--no-baselines", "--json")
    assert json.loads(run("evaluate", clean[0], *arguments).stdout)["rows"]
    page = tmp_path / "report.html"
    values = json.loads(run("report", clean[0], "--images", photos, "--limit", 2, "--out", page, "--json").stdout)
    assert values == {"report": str(page)}
    assert page.stat().st_size > 10_000


def test_inspect_gives_a_table_and_a_verdict(model, healthy, photos):
    said = run("inspect", model, "--images", photos).stdout
    assert all(title in said for title in ("median", "p99", "largest", "outliers", "photos", "The artefact is there"))
    assert "No artefact" in run("inspect", healthy, "--images", photos).stdout


def test_explain_shows_candidates_and_every_plan_tried(found):
    file, said = found
    told = testreg.RegisterPlan.load(file).provenance
    assert sum(line.startswith("* ") and line[2:].strip()[:1].isdigit() for line in said.splitlines()) == 1
    assert text.explanation(told) in said
    assert said.count("how many neurons") == sum(row["why"] == "how many neurons" for row in told["trials"])
    assert f"--plan {file}" in said


def test_what_is_asked_for_is_what_is_found(model, photos):
    asked = ("--top-k", 3, "--registers", 2, "--form", "dynamic", "--entry", 1, "--blocks", "1-4", "--threshold", 60)
    values = json.loads(run("find", model, "--images", photos, *asked, "--force", "--json").stdout)
    assert (values["registers"], values["form"], values["entry"]) == (2, "dynamic", 1)
    assert sum(map(len, values["neurons"].values())) == 3
    assert {int(block) for block in values["neurons"]} <= {1, 2, 3, 4}
    assert "60" in values["provenance"]["artefact"]["threshold"]
    values = json.loads(run("find", model, "--images", photos, "--recipe", "paper", "--force", "--json").stdout)
    assert (values["registers"], values["form"], values["entry"]) == (1, "dynamic", 0)
    assert sum(map(len, values["neurons"].values())) == 10


def test_a_plan_made_by_hand_is_enough(model, photos, tmp_path):
    (block, row), *_ = testreg.find(testreg.checkpoints.original.load_base(model), photos).neurons.items()
    testreg.RegisterPlan({block: row}, registers=1).save(tmp_path / "plan.safetensors")
    said = run("patch", model, "--images", photos, "--plan", tmp_path / "plan.safetensors", "--out", tmp_path / "out")
    assert "joining with the embeddings" in said.stdout
    assert testreg.active(testreg.load(tmp_path / "out")).plan.provenance == {}


@pytest.mark.parametrize("command", sorted(main.commands))
def test_help_has_an_example_and_no_stray_marks(command):
    said = run(command, "--help").stdout
    assert "\b" not in said
    assert f"testreg {command}" in said.split("Usage:", 1)[1].split("\n", 1)[1]
    assert all(len(line) <= 100 for line in said.splitlines())


def test_every_command_is_summed_up_in_the_help():
    said = run("--help").stdout
    rows = [line for line in said.split("Commands:")[1].splitlines() if line.strip()]
    assert [row.split()[0] for row in rows] == sorted(main.commands)
    assert all(row.rstrip().endswith(".") and not row.rstrip().endswith("...") for row in rows)


def test_a_typo_gets_the_nearest_command():
    assert "Did you mean 'patch'?" in run("patc", "x", code=2).stderr


@pytest.mark.parametrize("blocks", ["3:8", "a", "-", "3-", "3-8-9", "8-3", "²"])
def test_blocks_of_another_form_are_wrong_usage(blocks, model, photos):
    result = CliRunner().invoke(main, ["find", str(model), "--images", str(photos), f"--blocks={blocks}"])
    if blocks == "3-":  # from 3 to 3
        assert result.exit_code in (0, 1, 4)
    else:
        assert result.exit_code == 2
        assert "FIRST-LAST" in result.stderr


# The model is of no use


def test_no_model(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = tmp_path / "out"
    began = time.monotonic()
    refused("patch", "no-such-model", "--images", photos, "--out", out,
            says=("no-such-model", "no directory here", "hub"))  # fmt: skip
    assert time.monotonic() - began < 10  # no retries
    refused("patch", "./nowhere", "--images", photos, "--out", out, says="no directory ./nowhere")
    refused("patch", photos, "--images", photos, "--out", out, says="is no checkpoint")
    (tmp_path / "file").write_text("precious")
    refused("inspect", "file", "--images", photos, says="a checkpoint is a directory")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_no_artefact_has_an_exit_code_and_writes_nothing(healthy, photos, tmp_path):
    for command in ("patch", "find"):
        refused(command, healthy, "--images", photos, "--out", tmp_path / "out", code=3,
                says=("no high-norm artefact", "times the median", "Largest per block"))  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_unknown_architectures_are_named_and_the_row_is_shown(model, photos, monkeypatch):
    others = {name: row for name, row in testreg.FAMILIES.items() if name != "vit"}
    monkeypatch.setattr(testreg.runtime.families, "FAMILIES", others)  # taken out and put back, it would be the last
    result = run("inspect", model, "--images", photos, code=1)
    for part in ("ViTForImageClassification", "dinov2", "siglip", "Family("):
        assert part in result.stderr


def test_a_text_model_is_refused(photos, tmp_path):
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    result = run("patch", tmp_path / "bert", "--images", photos, "--out", tmp_path / "out", code=1)
    assert "BertModel" in result.stderr
    assert not (tmp_path / "out").exists()


def test_nan_in_the_weights_is_found_before_anything_else(model, photos, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    name = next(key for key in weights if "layers.2" in key or "layer.2" in key)
    weights[name].view(-1)[3] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    refused("patch", broken, "--images", photos, "--out", tmp_path / "out", says=("NaN", "download"))
    assert not (tmp_path / "out").exists()


def test_a_patched_checkpoint_is_not_patched_again(clean, photos, tmp_path):
    refused("patch", clean[0], "--images", photos, "--out", tmp_path / "out", says="has registers already")
    assert not (tmp_path / "out").exists()


# The photos are of no use


def test_no_images(model, tmp_path):
    empty, words, broken, one = (tmp_path / name for name in ("empty", "words", "broken", "one"))
    for folder in (empty, words, broken, one):
        folder.mkdir()
    (words / "readme.txt").write_text("no image")
    (broken / "zero.jpg").touch()
    (broken / "junk.png").write_bytes(b"junk" * 99)
    noise().save(one / "one.png")
    refused("patch", model, "--images", tmp_path / "typo", "--out", tmp_path / "out", says=("no file", "typo"))
    refused("patch", model, "--images", empty, "--out", tmp_path / "out", says="empty")
    refused("patch", model, "--images", words, "--out", tmp_path / "out", says="words")
    refused("patch", model, "--images", broken, "--out", tmp_path / "out", says=("zero.jpg", "junk.png"))
    refused("patch", model, "--images", one, "--out", tmp_path / "out", says=("1 different", "6"))
    assert not (tmp_path / "out").exists()
    assert "1 photos" in run("inspect", model, "--images", one / "one.png").stdout


def test_of_a_mixed_folder_the_good_are_used_and_the_others_told(model, photos, tmp_path, monkeypatch):
    folder = shutil.copytree(photos, tmp_path / "mixed")
    array = np.random.default_rng(1).integers(0, 65536, (96, 96), dtype=np.uint16)
    Image.fromarray(array).save(folder / "a16.png")
    noise(1).convert("P").save(folder / "b-palette.png")
    noise(2).convert("CMYK").save(folder / "c-cmyk.jpg")
    noise(3).convert("RGBA").save(folder / "d-alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(4).save(folder / "e-exif.jpg", exif=exif)
    noise(5).save(folder / "f.gif", save_all=True, append_images=[noise(6), noise(7)])
    Image.new("RGB", (1, 1)).save(folder / "g-pixel.png")
    Image.new("RGB", (3000, 3000)).save(folder / "h-bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    noise(8).save(folder / "i-whole.jpg")
    (folder / "i-truncated.jpg").write_bytes((folder / "i-whole.jpg").read_bytes()[:2000])
    (folder / "j-zero.jpg").touch()
    (folder / "k-notes.txt").write_text("no image")
    result = run("inspect", model, "--images", folder)
    assert f"{PHOTOS + 8} photos" in result.stdout
    assert f"skipped 3 of {PHOTOS + 11} image files, and 1 of other kinds: " in result.stderr
    for name in ("h-bomb.png", "i-truncated.jpg", "j-zero.jpg"):
        assert name in result.stderr
    result = run("patch", model, "--images", folder, "--out", tmp_path / "out")
    assert result.stderr.count("skipped") == 1  # told once, though the photos are read twice
    assert "3 files could not be read" in result.stdout
    assert run("inspect", model, "--images", photos).stderr == ""


# The place is of no use


@pytest.fixture
def no_work(monkeypatch):
    """Fails where the long work begins."""

    def work(*arguments, **more):
        raise AssertionError("the long work began")

    monkeypatch.setattr(cli, "_find", work)
    for name in ("pictures.show", "reporting.report", "evaluation.evaluate"):
        monkeypatch.setattr(f"testreg.judging.{name}", work)


@pytest.mark.usefixtures("no_work")
def test_a_place_that_cannot_be_written_is_refused_before_the_work(model, photos, tmp_path):
    (tmp_path / "file").write_text("precious")
    places = [tmp_path / "file", tmp_path / "file" / "under"]
    if Path("/proc/self").exists():
        places.append(Path("/proc/testreg/out"))
    for place in places:
        arguments = ("patch", model, "--images", photos, "--out", place)
        result = run(*arguments, code=1)
        assert str(place) in result.stderr
        assert "written" in result.stderr or "is a file" in result.stderr
        assert "not foreseen" not in result.stderr
    commands = {
        ("find", model, "--images", photos): "",
        ("show", model, photos / "00.png"): ".png",
        ("report", model, "--images", photos): ".html",
        ("evaluate", model, "--data", photos, "--task", "outliers"): ".csv",
    }
    (tmp_path / "folder.png").mkdir()
    for command, ending in commands.items():
        for place in (*(place / f"x{ending}" for place in places), tmp_path / "typo" / f"x{ending}"):
            refused(*command, "--out", place, says=("cannot be written", "there is no directory", "--out"))
    for command in list(commands)[:3]:
        refused(*command, "--out", tmp_path / "folder.png", says=("cannot be written", "it is a directory"))
    refused("evaluate", model, "--data", photos, "--task", "sinks", "--out", tmp_path / "x.xlsx", says=".csv or .json")
    refused(
        "show",
        model,
        photos / "00.png",
        "--out",
        tmp_path / "x.pgn",
        says="must end in .png, .jpg, .jpeg, .webp, .pdf or .svg.",
    )
    refused("find", model, "--images", photos, "--out", tmp_path / "file", says=("file", "holds no plan"))
    (tmp_path / "folder.png").rmdir()
    assert contents(tmp_path) == {"file": hashlib.sha256(b"precious").hexdigest()}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file, link = tmp_path / "table.csv", tmp_path / "link.csv"
    file.write_text("old")
    link.symlink_to(file)

    def fail():
        with console.writing(link) as build:
            build.write_text("ne")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(testreg.TestregError, match=r"link\.csv could not be written: No space left"):
        fail()
    assert file.read_text() == "old"
    with console.writing(link) as build:
        assert build.suffix == ".csv"
        build.write_text("new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(not Path(os.devnull).is_char_device(), reason="no device files here")
def test_a_device_stays_one():
    console.writable(Path(os.devnull))
    with console.writing(Path(os.devnull)) as build:
        testreg.RegisterPlan({}).save(build)
    assert Path(os.devnull).is_char_device()


def test_a_plan_can_be_read_by_whom_files_here_can(found, tmp_path):
    (tmp_path / "other").touch()
    assert found[0].stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.usefixtures("no_work")
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_for_reading_only_is_refused_before_the_work(model, photos, tmp_path):
    tmp_path.chmod(0o555)
    refused("patch", model, "--images", photos, "--out", tmp_path / "out", says="could not be written")


@pytest.mark.usefixtures("no_work")
def test_nothing_that_exists_is_harmed(model, photos, clean, tmp_path):
    before = contents(model)
    refused("patch", model, "--images", photos, "--out", model, says="was loaded from")
    refused("patch", model, "--images", photos, "--out", model, "--replace", says="was loaded from")
    assert contents(model) == before
    other = shutil.copytree(clean[0], tmp_path / "other")
    refused("patch", model, "--images", photos, "--out", other, says=("not empty", "--replace"))
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("precious")
    refused("patch", model, "--images", photos, "--out", tmp_path / "work", "--replace", says="thesis.txt")
    assert contents(other) == contents(clean[0])


@pytest.mark.parametrize("flag", ["--replace", "--force"])
def test_a_checkpoint_is_replaced_where_that_is_said(model, photos, found, clean, tmp_path, flag):
    other = shutil.copytree(clean[0], tmp_path / "other")
    (other / "README.md").write_text("old")
    done = run("patch", model, "--images", photos, "--plan", found[0], "--out", other, flag)
    assert ("for that alone is --replace" in done.stderr) == (flag == "--force")
    assert "test-time-registers" in (other / "README.md").read_text()


# The plan is of no use


def test_plans_that_do_not_fit(model, healthy, photos, found, tmp_path):
    def with_plan(plan, says, base=model):
        file = plan
        if not isinstance(plan, Path):
            file = tmp_path / "plan.safetensors"
            plan.save(file)
        refused("patch", base, "--images", photos, "--plan", file, "--out", tmp_path / "out", says=says)
        assert not (tmp_path / "out").exists()

    with_plan(testreg.RegisterPlan({6: (0,)}), ("block", "6"))
    with_plan(testreg.RegisterPlan({3: (96,)}), ("96",))
    with_plan(testreg.RegisterPlan({3: (1,)}, entry=2, state=torch.ones(1, 47)), ("47", "48"))
    with_plan(found[0], ("other weights", "find"), base=healthy)
    with_plan(tmp_path / "typo.safetensors", "typo.safetensors")
    with_plan(photos / "00.png", "cannot be read as a register plan")
    with_plan(Path(model / "model.safetensors"), "no register plan")


@pytest.mark.usefixtures("no_work")
def test_a_plan_of_another_model_is_refused_wherever_it_is_given(healthy, photos, found, tmp_path):
    for command in (
        ("show", healthy, photos / "00.png", "--out", tmp_path / "a.png"),
        ("report", healthy, "--images", photos, "--out", tmp_path / "a.html"),
        ("evaluate", healthy, "--data", photos, "--task", "outliers"),
    ):
        refused(*command, "--plan", found[0], says="has other weights")


@pytest.mark.usefixtures("no_work")
def test_typos_are_told_before_the_model_is_loaded(model, photos, tmp_path, monkeypatch):
    def load(*arguments, **more):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("testreg.checkpoints.original.load_base", load)
    typo, out = tmp_path / "typo", ("--out", tmp_path / "x.png")
    for command in (
        ("inspect", model, "--images", typo),
        ("find", model, "--images", typo, *out),
        ("patch", model, "--images", typo, *out),
        ("report", model, "--images", typo, *out),
        ("show", model, photos / "00.png", typo, *out),
        ("evaluate", model, "--data", typo, "--task", "sinks"),
    ):
        refused(*command, says=("there is no file or folder", str(typo)))
    refused("patch", model, "--images", photos, "--plan", typo, *out, says=("register plan", str(typo)))
    refused("inspect", model, "--images", photos, "--device", "gpu", says="--device gpu cannot be used")


# How it ends


def test_a_traceback_only_with_debug(model, tmp_path):
    arguments = ["inspect", str(model), "--images", str(tmp_path / "typo")]
    with pytest.raises(testreg.BadImages):
        CliRunner().invoke(main, ["--debug", *arguments], catch_exceptions=False)


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (testreg.Harmful("too far."), 4, "testreg: too far."),
        (testreg.NoOutliers("none."), 3, "testreg: none."),
        (KeyboardInterrupt(), 130, "testreg: interrupted."),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, "a smaller --batch-size"),
        (MemoryError(), 1, "a smaller --batch-size"),
        (ZeroDivisionError("by zero\nmore"), 1, "testreg: ZeroDivisionError: by zero (not foreseen"),
    ],
)
def test_every_end_is_one_line_and_a_code(raised, code, says, model, photos, monkeypatch):
    def fail(*arguments, **more):
        raise raised

    monkeypatch.setattr(cli, "load_model", fail)
    refused("inspect", model, "--images", photos, says=says, code=code)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("choose another, or pass replace=True (--replace).", "choose another, or pass --replace."),
        ("force=True (--force on the command line) takes it", "--force takes it"),
        ("with RegisterPlan.load(..., force=True) (--force).", "with --force."),
        ("Keep layers, keep=('a.b',) (--keep a.b), in float", "Keep layers, --keep a.b, in float"),
        ("pass plan=testreg.find(model, images) (--plan FILE on the command line).", "pass --plan FILE."),
        (
            "for torch.float32 and torch.float16 (--dtype float32).",
            "for torch.float32 and torch.float16 (--dtype float32).",
        ),
    ],
)
def test_errors_speak_of_options_alone(said, told):
    assert console.as_options(said) == told


def test_warnings_of_others_are_not_shown(model, photos, monkeypatch, caplog):
    def load(*arguments, **more):
        warnings.warn("noise of a library", stacklevel=2)
        logging.getLogger("torch.onnx").warning("noise in a log")
        raise testreg.BadCheckpoint("none.")

    monkeypatch.setattr(cli, "load_model", load)
    refused("inspect", model, "--images", photos, says="none.")
    assert not caplog.records


def test_sentences_fit_the_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "40")
    long = (
        "testreg: no high-norm artefact in the folder some/long-path/of-photos, so nothing to patch.\n    as it is "
        + "x" * 40
    )
    lines = console.wrapped(long, Terminal()).split("\n")
    assert all(len(line) <= 40 for line in lines[:-1])
    assert " ".join(lines[:-1]) + "\n" + lines[-1] == long
    assert console.wrapped(long, io.StringIO()) == long


# A fork has imported transformers already, which reads its settings only then: see `_no_bars`.
TESTREG = "import transformers\ntransformers.utils.logging.disable_progress_bar()\n" + MODULE.format(name="testreg")


def start(*arguments, **more):
    command = [sys.executable, "-m", "testreg", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def test_ctrl_c_ends_at_once_and_leaves_nothing(model, photos, forked, tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    for index in range(3000):
        os.link(photos / f"{index % PHOTOS:02d}.png", many / f"{index}.png")
    child = forked.start(many, TESTREG, "patch", model, "--images", many, "--out", tmp_path / "out")
    reading = f"/proc/{child.process.pid}/fd"
    if not Path(reading).exists():
        child.process.kill()
        pytest.skip("needs /proc")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.process.is_alive():
        if any(str(many) in name for name in _links(reading) if name.endswith(".png")):
            break
        time.sleep(0.001)
    os.kill(child.process.pid, signal.SIGINT)
    began = time.monotonic()
    ended = child.wait(30)
    assert time.monotonic() - began < 10
    assert ended == (130, "", "testreg: interrupted.\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "many.err", "many.out"]


def test_ctrl_c_while_torch_is_imported_ends_at_once(tmp_path):
    """Torch is set up by C++ code, which aborts on an exception of Python's: so none may be raised there."""
    (tmp_path / "torch.py").write_text(
        "import os, time\nprint('begun', flush=True)\ntry:\n    time.sleep(60)\nexcept BaseException:\n    os.abort()\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    child = start("inspect", "model", "--images", "photos", env={**os.environ, "PYTHONPATH": path},
                  preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
    assert child.stdout.readline() == "begun\n"
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err) == (130, "", "testreg: interrupted.\n")


def test_help_and_wrong_usage_wait_for_no_library():
    code = """
import sys
from click.testing import CliRunner
from testreg.cli import main
asked = [["--help"], ["--version"], ["patc"], ["find"], *([name, "--help"] for name in main.commands)]
assert [CliRunner().invoke(main, words).exit_code for words in asked] == [0, 0, 2, 2] + [0] * len(main.commands)
assert not {"torch", "transformers", "numpy", "matplotlib"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def _links(folder):
    for link in Path(folder).iterdir():
        try:
            yield os.readlink(link)
        except OSError:
            continue  # closed meanwhile


def test_a_reader_that_goes_away_is_no_error_to_see(model, photos, forked, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    gone = "import os\nreader, writer = os.pipe()\nos.dup2(writer, 1)\nos.close(reader)\n"
    _, _, err = forked.run(here, gone + TESTREG, "inspect", model, "--images", photos)
    assert err == ""


def test_nothing_but_the_answer_where_nobody_watches(model, photos):
    child = start("inspect", model, "--images", photos, "--json")
    out, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (0, "")
    assert json.loads(out)["artefact"]


# Export


def test_export_to_stock_weights(clean, photos, tmp_path):
    pytest.importorskip("timm")
    out = tmp_path / "stock"
    values = json.loads(
        run("export", clean[0], "--format", "stock", "--images", photos, "--out", out, "--force", "--json").stdout
    )
    assert values["library"] == "timm"
    assert values["drift"]["images"] == PHOTOS // 2
    assert json.loads((out / "config.json").read_text())["model_args"]["reg_tokens"] > 0
    again = ("export", clean[0], "--format", "stock", "--images", photos, "--out", out)
    before = contents(out)
    for more in ((), ("--force",)):  # which is about the drift
        refused(*again, *more, says=("not empty", "--replace"))
    assert contents(out) == before
    run(*again, "--replace", "--force")
    said = text.stock(values)
    assert f"local-dir:{out}" in said
    assert f"{values['drift']['patches']:.4f}" in said


def test_export_to_onnx(clean, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        "testreg.export.onnx.export_onnx", lambda model, file, **more: written.append((model, file, more))
    )
    file = tmp_path / "vit.onnx"
    said = run("export", clean[0], "--format", "onnx", "--dtype", "float16", "--out", file, "--replace").stdout
    assert f"ONNX in {file}: float16" in said
    ((patched, *rest),) = written
    assert testreg.active(patched) is not None
    assert rest == [file, {"dtype": torch.float16, "replace": True}]


def test_export_of_a_model_without_registers_or_options_that_do_not_go_together(model, photos, tmp_path):
    out = ("--out", tmp_path / "x.onnx")
    assert "needs --images" in run("export", model, "--format", "stock", *out, code=2).stderr
    for more in (("--images", photos), ("--library", "timm")):
        assert f"does not take {more[0]}" in run("export", model, "--format", "onnx", *more, *out, code=2).stderr
    stock = ("export", model, "--format", "stock", "--images", photos, "--out", tmp_path / "x")
    refused(*stock, says=("not patched", "--plan"))
    assert list(tmp_path.iterdir()) == []


def test_export_does_not_take_the_plan_of_another_model(healthy, found, tmp_path, monkeypatch):
    monkeypatch.setattr("testreg.export.onnx.export_onnx", lambda *arguments, **more: None)
    arguments = ("export", healthy, "--format", "onnx", "--plan", found[0], "--out", tmp_path / "x.onnx")
    refused(*arguments, says=("other weights", "force"))
    run(*arguments, "--force")


# Real checkpoints


def real(assets, count, folder):
    folder.mkdir()
    for path in sorted((assets / "images/coco_cc/images").iterdir())[:count]:
        os.symlink(path, folder / path.name)
    return folder


def test_the_main_job_on_a_real_checkpoint(assets, tmp_path):
    arguments = ("--images", real(assets, 32, tmp_path / "photos"), "--out", tmp_path / "clean", "--json")
    values = json.loads(run("patch", assets / "checkpoints/vit-tiny-augreg", *arguments).stdout)
    told = values["plan"]["provenance"]
    assert (told["candidates"][0]["block"], told["candidates"][0]["neuron"]) == (7, 417)
    assert 417 in values["plan"]["neurons"]["7"]
    assert told["before"]["outlier_patches"] == pytest.approx(0.02, abs=0.002)
    assert round(told["after"]["outlier_patches"], 4) == 0
    assert told["guard"]["agreement"] >= 0.98
    assert values["after"]["blocks"][-1]["share"] == 0
    assert testreg.active(testreg.load(tmp_path / "clean")).plan.to_dict()["neurons"] == values["plan"]["neurons"]


def test_a_real_checkpoint_without_the_artefact_is_refused(assets, tmp_path):
    arguments = ("--images", real(assets, 16, tmp_path / "photos"), "--out", tmp_path / "clean")
    refused("patch", assets / "checkpoints/deit-tiny", *arguments, code=3,
            says=("nothing to patch", "times the median", "as norms:"))  # fmt: skip
    assert not (tmp_path / "clean").exists()


def test_codes_are_those_of_the_help():
    said = " ".join(run("--help").stdout.split())
    assert "3 the model has no artefact, 4 no plan or export passes the guard" in said
    assert {testreg.NoOutliers: 3, testreg.Harmful: 4} == console.EXITS
