"""The notebooks in `examples/` run from top to bottom, offline, and on a real checkpoint where there is one."""

import re
from pathlib import Path

import pytest

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
from jupyter_client.manager import KernelManager  # noqa: E402 - it comes with nbclient

EXAMPLES = Path(__file__).parents[1] / "examples"
SAYS = {  # notebook -> what it prints, from numbers that it works out
    "clean_attention_maps": r"the patch that gets most: (?P<before>[\d.]+)% before, (?P<after>[\d.]+)% after",
    "object_discovery": r"CorLoc",
    "vision_language_model": r"projector gets: (?P<before>[\d.]+) before, (?P<after>[\d.]+) after",
    "adding_a_family": r"largest norm: (?P<before>\d+) before, (?P<after>\d+) after",
    "language_model": r"largest norm: (?P<before>\d+) before, (?P<after>\d+) after",
    "extract_features": r"64 photos, 196 patches each; the largest norm is (?P<after>[\d.]+) times the median",
}

ONE_MODEL = """
import functools
from testreg.demo import demonstration
demonstration.demo_model = functools.cache(demonstration.demo_model)
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One kernel for all notebooks, each of which begins with an empty namespace: imports are most of their time.

    Next is the model of the demonstration, which each would make anew.
    """
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(tmp_path_factory.mktemp("examples")))
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=120)
    client.execute_interactive(ONE_MODEL, store_history=False)
    client.stop_channels()
    yield manager
    manager.shutdown_kernel(now=True)


def read(name):
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def printed(kernel, book, **given):
    """What a notebook prints, run with other values for what its cell with the tag `parameters` sets."""
    for cell in book.cells:
        if given and "parameters" in cell.metadata.get("tags", ()):
            cell.source = "\n".join(f"{key} = {value!r}" for key, value in given.items())
            given = {}
            break
    assert not given, "no cell has the tag `parameters`"
    book.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    client = nbclient.NotebookClient(book, km=kernel, timeout=120)
    client.execute(cleanup_kc=False)
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def test_every_notebook_is_here():
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_notebooks_are_stored_without_outputs(name):
    book = read(name)
    nbformat.validate(book)
    assert all(not cell.outputs and cell.execution_count is None for cell in book.cells if cell.cell_type == "code")


@pytest.mark.parametrize("name", SAYS)
def test_offline(kernel, name):
    text = printed(kernel, read(name))
    said = re.search(SAYS[name], text)
    assert said, text
    numbers = {key: float(value) for key, value in said.groupdict().items()}
    if "before" in numbers:
        assert numbers["after"] < 0.5 * numbers["before"]
    if name == "extract_features":
        assert numbers["after"] < 3
    assert "False" not in text  # nothing that a notebook checks fails


def test_clean_attention_maps_of_a_real_model(kernel, assets, tmp_path):
    checkpoint = assets / "checkpoints" / "vit-tiny-augreg"
    for photo in sorted((assets / "images" / "coco_cc" / "images").iterdir())[:16]:
        (tmp_path / photo.name).symlink_to(photo.resolve())
    text = printed(kernel, read("clean_attention_maps"), MODEL=str(checkpoint), PHOTOS=str(tmp_path))
    before, after = map(float, re.search(SAYS["clean_attention_maps"], text).groups())
    assert after < before
    assert "unchanged: True" in text


def test_object_discovery_with_a_real_model(kernel, assets):
    checkpoint, photos = assets / "checkpoints" / "vit-tiny-augreg", assets / "images" / "coco_cc"
    text = printed(kernel, read("object_discovery"), MODEL=str(checkpoint), PHOTOS=str(photos), LIMIT=8)
    found = dict(re.findall(r"^ +(unpatched|patched) +([\d.]+)", text, re.MULTILINE))
    assert float(found["patched"]) > float(found["unpatched"])
