"""timm's own tests of its models, on plain and on patched ones: `python -m tests.benchmarks.peers`, or `make peers`.

The tests come with timm's source distribution, in the version that is installed; they are fetched from the package
index. They are run once as they are, and once for each form of registers, with every vision tower patched that they
make. What passes plain has to pass patched; what does not is printed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

FORM = "TESTREG_PEERS_FORM"
FORMS = ("plain", "attention", "constant", "dynamic")
MODELS = {
    *("test_vit", "test_vit2", "test_vit3", "test_vit4", "vit_tiny_patch16_224", "vit_xsmall_patch16_clip_224"),
    *(
        "deit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "eva02_tiny_patch14_224",
        "naflexvit_base_patch16_gap",
    ),
}
# Neither torch.jit.script nor torch.fx follows a patched model: docs/limits.md.
NOT_FOLLOWED = ("test_model_forward_torchscript", "test_model_forward_fx", "test_model_backward_fx")


def main() -> int:
    """Print the table; the exit status says whether a test fails patched that passes plain."""
    with tempfile.TemporaryDirectory() as folder:
        tests = _fetched(Path(folder))
        results = {form: _run(tests, form) for form in FORMS}
    passed = {form: {name for name, how in result.items() if how == "passed"} for form, result in results.items()}
    kinds = sorted({name.split("[")[0] for name in results["plain"]})
    print("| test | " + " | ".join(FORMS) + " |")
    print("|---|" + "---|" * len(FORMS))
    for kind in kinds:
        counts = (sum(name.split("[")[0] == kind for name in passed[form]) for form in FORMS)
        print(f"| `{kind}` | " + " | ".join(map(str, counts)) + " |")
    worse = {
        form: sorted(name for name in passed["plain"] - passed[form] if not name.startswith(NOT_FOLLOWED))
        for form in FORMS[1:]
    }
    for form, names in worse.items():
        for name in names:
            print(f"fails with {form} registers alone: {name}")
    return any(worse.values())


def _fetched(folder: Path) -> Path:
    """The folder of timm's tests."""
    wanted = f"timm=={version('timm')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm", wanted]
    subprocess.run(command, cwd=folder, check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return next(folder.glob("timm-*/tests"))


def _run(tests: Path, form: str) -> dict[str, str]:
    """Test -> "passed", "failed" or "skipped"."""
    report = tests.parent / f"{form}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peers"]
    command += [
        "--rootdir",
        str(tests),
        "-c",
        os.devnull,
        "--junitxml",
        str(report),
        "-n",
        "2",
        str(tests / "test_models.py"),
    ]
    here = Path(__file__).parents[2]
    path = os.pathsep.join(map(str, (Path(__file__).parent, here / "tests", here)))
    environment = {**os.environ, FORM: form, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tests.parent, env=environment, capture_output=True, text=True)
    if not report.exists():
        raise SystemExit(f"timm's tests did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return {case.get("name", ""): _outcome(case) for case in ElementTree.parse(report).iter("testcase")}


def _outcome(case: ElementTree.Element) -> str:
    return "failed" if {"failure", "error"} & {part.tag for part in case} else "skipped" if len(case) else "passed"


# As a plugin of the run


def pytest_configure(config: Any) -> None:
    """Every model that timm makes is patched."""
    import torchvision_stub

    torchvision_stub.install()
    form = os.environ.get(FORM, "plain")
    if form != "plain":
        import timm

        made = timm.create_model

        def create_model(*args: Any, **kwargs: Any) -> Any:
            return _patched(made(*args, **kwargs), form)

        timm.create_model = create_model


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Those of small Vision Transformers alone."""
    if FORM in os.environ:
        items[:] = [item for item in items if getattr(item, "callspec", None) and _wanted(item.callspec.params)]


def _wanted(params: dict[str, Any]) -> bool:
    return params.get("model_name") in MODELS


def _patched(model: Any, form: str) -> Any:
    import torch

    import testreg
    from testreg.runtime.towers import find_tower

    try:
        tower = find_tower(model)
    except testreg.UnsupportedModel:
        return model
    blocks, channels = len(tower.blocks), tower.channels
    entry = 0 if form == "dynamic" else blocks // 2
    shape = {"dynamic": None, "constant": (2, channels), "attention": (blocks - entry, 2, channels)}[form]
    state = None if shape is None else torch.randn(shape, generator=torch.Generator().manual_seed(0))
    testreg.patch(model, testreg.RegisterPlan({max(0, blocks // 2 - 1): (3, 5)}, 2, entry, state))
    return model


if __name__ == "__main__":
    sys.exit(main())
