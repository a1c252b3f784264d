"""How photos are processed where nothing lies with the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
import zoo
from click.testing import CliRunner
from PIL import Image

from testreg.cli.group import main


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint without an image processor, and photos."""
    built, _ = zoo.build("ViTModel")
    built.save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    generator = np.random.default_rng(0)
    for index in range(6):
        pixels = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.png")
    return tmp_path


def call(model: Path, *more: str):
    given = ["inspect", str(model / "model"), "--images", str(model / "photos"), "--json", *more]
    return CliRunner().invoke(main, given)


def test_by_size_mean_and_deviation(model):
    found = call(model, "--size", "32", "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["images"] == 6


def test_as_another_checkpoint_does(model):
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(model / "other")
    found = call(model, "--processor", str(model / "other"))
    assert found.exit_code == 0, found.output
    torch.testing.assert_close(json.loads(found.stdout)["images"], 6)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "--processor NAME"),
        (("--mean", "0.5,0.5,0.5"), "go with --size"),
        (("--size", "32", "--processor", "x"), "not both"),
        (("--size", "32", "--mean", "grey"), "R,G,B"),
    ],
)
def test_what_is_missing_or_wrong_is_told(model, more, says):
    found = call(model, *more)
    assert found.exit_code in (1, 2)
    assert says in found.output.replace("\n", " ")
