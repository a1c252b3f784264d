"""Checkpoints on disk, with registers and without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import transformers as hf
from hub_server import Hub, serving
from patched_models import patched
from zoo import build

import testreg
from testreg.checkpoints import sharing


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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with an empty cache on this side of it."""
    with serving() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.hf_api, "ENDPOINT", server.url, raising=False)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            server.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_nobody")
        monkeypatch.setattr(sharing, "HfApi", lambda token=None: huggingface_hub.HfApi(server.url, token=token))
        yield server
