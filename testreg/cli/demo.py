"""The command `demo`: the main job offline."""

from __future__ import annotations

from pathlib import Path

import click

from . import words
from .finding import patch_and_save
from .group import Place, as_json, main, print_json, say

DEMO = """This is a demonstration: {model} is a small random Vision Transformer
into which an artefact was planted. The photos in {photos} are real ones, from scikit-image.
"""
OWN = """
Picture in {picture}.

Your own model:

    testreg patch MODEL --images PHOTOS --out DIRECTORY"""


@main.command(short_help="The main job offline, on a small planted model.")
@click.option("--out", type=Place(path_type=Path), default="demo", show_default=True, help="A new directory.")
@click.option("--replace", is_flag=True, help="Use a directory that holds an earlier demonstration.")
@click.option("--force", is_flag=True, hidden=True)  # what version 0.1 calls --replace
@as_json
def demo(out: Path, replace: bool, force: bool, as_json: bool) -> None:
    """Do the main job offline: photos from scikit-image, and a small model with planted register neurons.

    \b
    testreg demo --out demo
    """
    from ..checkpoints.original import load_base
    from ..demo.demonstration import write
    from ..judging.pictures import show as draw

    replace = replace or force
    model, photos = write(out, replace=replace)
    if not as_json:
        say(DEMO.format(model=model, photos=photos))
    loaded = load_base(model)
    given = {"images": photos, "batch_size": 16, "workers": 0}
    plan, told = patch_and_save(loaded, None, out / "patched", given, replace=replace)
    picture = out / "before_after.png"
    draw(loaded, plan, sorted(photos.iterdir())[:4]).savefig(picture, dpi=150)
    if as_json:
        return print_json({"model": str(model), "photos": str(photos), "picture": str(picture), **told})
    say(words.patched(told), OWN.format(picture=picture))
