"""A package that brings a family is really installed, and its row found through its entry point."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which pip has installed the package of tests/garden."""
    folder = tmp_path_factory.mktemp("outside")
    shutil.copytree(HERE / "garden", folder / "source")
    pip = ("install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    subprocess.run(
        [sys.executable, "-m", "pip", *pip, "--target", folder / "site", folder / "source"], check=True, timeout=120
    )
    return folder / "site"


def python(site: Path, code: str) -> str:
    """What Python prints where `site` is installed."""
    path = os.pathsep.join([str(site), str(HERE.parent)])
    environment = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, cwd=site
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_its_row_is_found_and_passes_the_checks(installed):
    assert (installed / "garden-1.0.dist-info" / "entry_points.txt").is_file()
    said = python(
        installed,
        """
        import sys, torch, testreg
        from testreg.testing import check
        from garden.model import GardenViT

        assert "garden.rows" not in sys.modules
        tower = check(GardenViT(), lambda images: {"images": torch.randn(images, 3, 32, 32)})
        print(tower.family, "garden-vit" in testreg.FAMILIES)
        """,
    )
    assert said == "garden-vit True\n"


def test_it_costs_nothing_where_the_model_is_known(installed):
    said = python(
        installed,
        """
        import sys, transformers, testreg
        from testreg.runtime.towers import find_tower

        model = transformers.ViTModel(transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
        ))
        print(find_tower(model).family, "garden" in sys.modules)
        """,
    )
    assert said == "vit False\n"


@pytest.fixture
def broken(installed, tmp_path):
    """The same folder, with a package whose rows cannot be had, one without rows, and one whose name is taken."""
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    for name, point, code in (
        ("weeds", "weeds = weeds:ROW", "raise RuntimeError('no rain')"),
        ("stones", "stones = stones:ROW", "ROW = 5"),
        ("thief", "vit = thief:ROW", "import testreg\nROW = testreg.Family('Mine', 'layers')"),
    ):
        (site / f"{name}.py").write_text(code)
        info = site / f"{name}-2.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
        (info / "entry_points.txt").write_text(f"[testreg.families]\n{point}\n")
    return site


def test_a_broken_one_is_a_warning_that_names_it_and_the_others_are_there(broken):
    said = python(
        broken,
        """
        import warnings, testreg
        from testreg.runtime.towers import find_tower
        from garden.model import GardenViT

        before = testreg.FAMILIES["vit"]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert find_tower(GardenViT()).family == "garden-vit"
            assert find_tower(GardenViT()).family == "garden-vit"
        assert testreg.FAMILIES["vit"] is before
        for warning in told:
            print(warning.category.__name__, warning.message)
        """,
    )
    lines = said.splitlines()
    assert lines == [
        "FamilyLeftOut the families of the package stones 2.0 (stones = stones:ROW) are left out: TypeError: a "
        "testreg.Family is needed, or a mapping of names to such, not a int",
        "FamilyLeftOut the families of the package weeds 2.0 (weeds = weeds:ROW) are left out: RuntimeError: no rain",
        "FamilyLeftOut the family 'vit' that a package brings is left out: there is one of that name already",
    ]
