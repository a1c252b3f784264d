"""Checkpoints on disk, with registers and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers as hf
from patched_models import patched
from zoo import build

import testreg


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No progress bars, and nothing from the network."""
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint with constant registers."""
    return testreg.save(patched()[0], tmp_path / "clean")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The same without registers, as transformers saves it."""
    build("ViTForImageClassification")[0].save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"
