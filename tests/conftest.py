import os
from pathlib import Path
from types import ModuleType

import forks
import pytest
import torchvision_stub

torchvision_stub.install()  # before anything imports transformers
pytest.register_assert_rewrite("commands", "patched_models")  # their assertions tell what differs, as those of tests


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real checkpoints and photos, `TESTREG_ASSETS`, by default `../shared` beside the checkout."""
    folder = Path(os.environ.get("TESTREG_ASSETS") or Path(__file__).parents[2] / "shared")
    if not (folder / "checkpoints").is_dir():
        pytest.skip(
            f"no real checkpoints at {folder}: set TESTREG_ASSETS to the folder that holds checkpoints/ and images/"
        )
    return folder


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """`forks`, whose server runs."""
    forks.serve(tmp_path_factory.mktemp("modules"))
    return forks
