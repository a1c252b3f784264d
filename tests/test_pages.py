"""What README and docs say, run as it is written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
import transformers as hf
from commands import noise
from packaging.requirements import Requirement

import testreg
from testreg.demo.planted import plant
from testreg.testing import unit_gain

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHAPE = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "image_size": 96, "patch_size": 8}


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def shell(text: str) -> list[str]:
    """The lines of indented blocks, without what is said about them."""
    return [line.split(" #")[0].strip() for line in text.splitlines() if line.startswith("    ")]


def closure(name: str) -> set[str]:
    """A package and all that it needs, without extras."""
    found, wanted = set(), [name]
    while wanted:
        current = wanted.pop().lower().replace("_", "-")
        if current in found:
            continue
        found.add(current)
        needs = map(Requirement, distribution(current).requires or ())
        wanted += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, str]:
    """Variables of an environment in which `pip install .` is all that was installed, and `testreg` a command."""
    folder = tmp_path_factory.mktemp("alone")
    site, commands = folder / "site", folder / "bin"
    pip = ("install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", *pip, "--target", site, ROOT], check=True, timeout=300)
    for name in closure("testreg") - {"testreg"}:
        for file in distribution(name).files or ():
            top = Path(file.parts[0])
            if file.parts[0] not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    commands.mkdir()
    entry = next(point for point in distribution("testreg").entry_points if point.group == "console_scripts")
    (commands / "testreg").write_text(
        f"#!/bin/sh\nexec {sys.executable} -S -c 'from {entry.module} import {entry.attr}; {entry.attr}()' \"$@\"\n"
    )
    (commands / "testreg").chmod(0o755)
    kept = {name: os.environ[name] for name in ("HOME", "OMP_NUM_THREADS") if name in os.environ}
    return {**kept, "PATH": f"{commands}:/usr/bin:/bin", "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with photos, and a checkpoint of the name that README has, with the artefact."""
    folder = tmp_path_factory.mktemp("here")
    torch.manual_seed(0)
    model = hf.Dinov2Model(hf.Dinov2Config(**SHAPE)).eval()
    plant(model, where="corners")
    model.save_pretrained(folder / "facebook" / "dinov2-base")
    processor = hf.ViTImageProcessorPil(size={"height": 96, "width": 96})
    processor.save_pretrained(folder / "facebook" / "dinov2-base")
    (folder / "photos").mkdir()
    for index in range(16):
        noise(index).save(folder / "photos" / f"{index}.png")
    return folder


def run(line: list[str], here: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(line, cwd=here, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{shlex.join(line)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_nothing_but_the_package_is_there(alone, here):
    code = (
        "import importlib.util as u\n"
        "print([n for n in ('testreg', 'torch', 'pytest', 'skimage', 'timm', 'sklearn', 'jinja2') if u.find_spec(n)])"
    )
    assert run([sys.executable, "-S", "-c", code], here, alone) == "['testreg', 'torch', 'jinja2']\n"  # torch needs it


def test_readmes_commands_run_as_written(alone, here):
    install, patch = shell(section("Use it"))
    assert install == "pip install ."
    said = run(shlex.split(patch), here, alone)
    assert 'testreg.load("dinov2-clean")' in said
    assert (here / "dinov2-clean" / "registers.safetensors").is_file()
    (inspect,) = re.findall(r"`(testreg inspect MODEL [^`]*)`", section("Use it"))
    said = run(shlex.split(inspect.replace("MODEL", "facebook/dinov2-base")), here, alone)
    assert "The artefact is there" in said
    assert "Locked to places: 100% of the outliers" in said


def test_readmes_python_runs_as_written(alone, here):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    checks = "assert testreg.active(model).plan == found\nprint(found.registers > 0, type(model).__name__)\n"
    assert run([sys.executable, "-S", "-c", code + checks], here, alone).endswith("True Dinov2Model\n")


def test_readmes_commands_for_sharing_are_commands(alone, here):
    find, patch, census = shell(section("Share, look around, extend"))
    run(shlex.split(census.replace("MODEL MODEL", "facebook/dinov2-base dinov2-clean")), here, alone)
    rows = (here / "census.md").read_text().splitlines()
    assert [row.split(" | ")[2] for row in rows[2:]] == ["artefact", "none"]
    for line, missing in ((find, "could not be written to owner/name"), (patch, "of owner/name")):
        command = shlex.split(line.replace("MODEL", "facebook/dinov2-base").replace("DIR", "out"))
        done = subprocess.run(command, cwd=here, env=alone, capture_output=True, text=True, timeout=300)
        assert done.returncode == 1  # there is no hub here
        assert missing in done.stderr


def test_readmes_links_within_the_repository_lead_somewhere():
    pages_of_others = {"docs/quantisation.md", "docs/language.md"}
    links = set(re.findall(r"\]\((?!http)([^)#\s]+)", README)) - pages_of_others
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_a_hand_written_register_is_the_plan_of_the_page_on_moving():
    text = (ROOT / "docs" / "moving.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/moving.md", "exec"), names)
    torch.manual_seed(0)
    model = hf.ViTModel(hf.ViTConfig(**{**SHAPE, "num_hidden_layers": 8}, intermediate_size=512)).eval()
    unit_gain(model)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        plain = model(images).last_hidden_state
        with testreg.patch(model, names["plan"]):
            here = model(images).last_hidden_state
        handles = [model.layers[0].register_forward_pre_hook(names["with_register"])]
        for block, row in names["neurons"].items():
            handles.append(model.layers[block].mlp.fc2.register_forward_pre_hook(names["moved"](row)))
        by_hand = model(images).last_hidden_state
        for handle in handles:
            handle.remove()
    assert by_hand.shape[1] == plain.shape[1] + 1 == here.shape[1] + 1
    torch.testing.assert_close(by_hand[:, :-1], here, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, here, atol=1e-2)
