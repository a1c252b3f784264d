"""The command line: each command a thin call of the package."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from . import text
from .console import Commands, wrapped, writable, writing
from .errors import TestregError

DEMO = """This is a demonstration: {model} is a small random Vision Transformer
into which an artefact was planted. The photos in {photos} are real ones, from scikit-image.
"""
OWN = """
Picture in {picture}.

Your own model:

    testreg patch MODEL --images PHOTOS --out DIRECTORY"""


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="testreg")
def main(debug: bool) -> None:
    """Test-time registers for pretrained Vision Transformers, without training.

    \b
    testreg inspect MODEL --images photos/              has it high-norm artefact patches?
    testreg inspect MODEL --text FILE                   has a language model attention sinks?
    testreg patch MODEL --images photos/ --out DIR      find, verify, save: the main job
    testreg demo                                        the same on a small planted model, offline

    MODEL is a directory or a name on the Hugging Face hub. Exit codes: 0 done, 1 an error, 2 wrong
    usage, 3 the model has no artefact, 4 no plan or export passes the guard.
    """


def options(*which: Callable[..., Any]) -> Callable[..., Any]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(which):
            command = option(command)
        return command

    return decorate


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
loading = options(
    click.option("--device", help="Where to run, as torch names it: cpu, cuda, mps. Default: cuda where there is one."),
    click.option(
        "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Default: as in the checkpoint."
    ),
)
IMAGES: dict[str, Any] = {"type": click.Path(), "help": "A folder of photos, or one; 16 to 64 are enough."}
running = options(
    click.option("--batch-size", type=click.IntRange(min=1), default=16, help="Photos at a time.", show_default=True),
    click.option("--workers", type=click.IntRange(min=0), help="Processes that decode photos. Default: this one."),
    loading,
)
with_plan = click.option(
    "--plan", "plan_file", type=click.Path(), help="Registers for a MODEL that has none, as `find --out` wrote them."
)
photos = options(click.option("--images", required=True, **IMAGES), running)
choices = options(
    click.option("--threshold", type=float, help="Norm from which on a patch is an outlier."),
    click.option("--blocks", help="Where register neurons may be: FIRST-LAST, from 0."),
    click.option("--top-k", type=int, help="Number of register neurons."),
    click.option("--registers", type=int, help="Number of registers."),
    click.option(
        "--form", type=click.Choice(["dynamic", "constant"]), help="What the registers hold: maxima, or a constant."
    ),
    click.option("--entry", type=int, help="Block before which the registers join; 0 = with the embeddings."),
    click.option(
        "--recipe",
        type=click.Choice(["auto", "paper"]),
        default="auto",
        help="paper = as published.",
        show_default=True,
    ),
)


@main.command(short_help="Find, verify, save: the main job.")
@click.argument("model")
@photos
@choices
@click.option("--plan", "plan_file", type=click.Path(), help="Use this plan, as `find --out` wrote it.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the patched checkpoint.")
@click.option("--force", is_flag=True, help="Replace the checkpoint in --out; save even if the guard refuses.")
@as_json
def patch(model: str, out: Path, plan_file: str | None, force: bool, as_json: bool, **given: Any) -> None:
    """Find the register neurons of MODEL, verify the patch on held-out photos, and save the patched model.

    \b
    testreg patch google/vit-base-patch16-224 --images photos/ --out vit-clean

    Nothing needs to be set: what no option fixes is found.
    """
    loaded, plan = _load_both(model, plan_file, given, patched=False, check=not force)
    _, told = _patch(loaded, plan, out, given, force=force)
    if as_json:
        return _print_json(told)
    _say(text.patched(told))


@main.command(short_help="Find register neurons and registers, and save them as a plan.")
@click.argument("model")
@photos
@choices
@click.option("--out", type=click.Path(path_type=Path), help="Write the plan here, a safetensors file of a few kB.")
@click.option("--explain", is_flag=True, help="Show the candidates and every plan tried.")
@click.option("--force", is_flag=True, help="Give the best plan even if the guard refuses it.")
@as_json
def find(model: str, out: Path | None, explain: bool, force: bool, as_json: bool, **given: Any) -> None:
    """Find the register neurons of MODEL and the registers that take their place. The model is not changed.

    \b
    testreg find google/vit-base-patch16-224 --images photos/ --explain --out plan.safetensors

    Nothing needs to be set: what no option fixes is found.
    """
    from .parallel import leads

    writable(out)
    if out and out.is_file() and not _holds_plan(out):
        raise TestregError(f"{out} is there and holds no plan; nothing else is replaced. Give another --out.")
    plan = _find(_load(model, given), given, force=force)
    if out and leads():
        with writing(out) as file:
            plan.save(file)
    if as_json:
        return _print_json(plan.to_dict())
    told = plan.provenance
    explanation = text.explanation(told) if explain else ""
    _say(text.paragraphs(text.plan(plan.to_dict()), explanation, text.guard(told)))
    if out:
        images = given["images"]
        _say(f"\nPlan in {out}. Apply it:\n\n    testreg patch {model} --images {images} --plan {out} --out DIRECTORY")


@main.command(short_help="Has a model the artefact? Patch norms per block.")
@click.argument("model")
@click.option("--images", **IMAGES)
@click.option("--text", "text_file", type=click.Path(path_type=Path), help="A text, to look at a language model.")
@click.option("--threshold", type=float, help="Norm from which on a patch is an outlier.")
@running
@as_json
def inspect(
    model: str, images: str | None, text_file: Path | None, threshold: float | None, as_json: bool, **given: Any
) -> None:
    """Patch norms of MODEL block by block, and whether it has the artefact. MODEL may be a patched one.

    \b
    testreg inspect google/vit-base-patch16-224 --images photos/

    With --text instead of --images: attention sinks and massive activations of a causal language model.
    """
    from . import inspect as look

    if (images is None) == (text_file is None):
        raise click.UsageError("give either --images, to look at a vision tower, or --text, at a language model.")
    if text_file:
        from .language import find_blocks

        read = look(_load(model, given, check=find_blocks), text=text_file, batch_size=given["batch_size"])
        return _print_json(read.to_dict()) if as_json else _say(text.sinks(read.to_dict()), wrapped(read.verdict))
    found = look(
        _load(model, {**given, "images": images}, patched=True), images, threshold=threshold, **_running(given)
    )
    if as_json:
        return _print_json(found.to_dict())
    _say(text.norms(found.to_dict()["blocks"]), f"An outlier has {found.threshold} or more; {found.images} photos.")
    _say(wrapped(text.attention(found.to_dict()["attention"])), wrapped(found.verdict))


@main.command(short_help="The main job offline, on a small planted model.")
@click.option("--out", type=click.Path(path_type=Path), default="demo", show_default=True, help="A new directory.")
@click.option("--force", is_flag=True, help="Use a directory that holds an earlier demonstration.")
@as_json
def demo(out: Path, force: bool, as_json: bool) -> None:
    """Do the main job offline: photos from scikit-image, and a small model with planted register neurons.

    \b
    testreg demo --out demo
    """
    from .checkpoint import load_base
    from .demo import write
    from .show import show as draw

    model, photos = write(out, force=force)
    if not as_json:
        _say(DEMO.format(model=model, photos=photos))
    loaded = load_base(model)
    given = {"images": photos, "batch_size": 16, "workers": 0}
    plan, told = _patch(loaded, None, out / "patched", given, force=force)
    picture = out / "before_after.png"
    draw(loaded, plan, sorted(photos.iterdir())[:4]).savefig(picture, dpi=150)
    if as_json:
        return _print_json({"model": str(model), "photos": str(photos), "picture": str(picture), **told})
    _say(text.patched(told), OWN.format(picture=picture))


def _patch(model: Any, plan: Any, out: Path, given: Mapping[str, Any], *, force: bool) -> tuple[Any, dict[str, Any]]:
    """The main job: find, verify, save. The plan, and what there is to tell."""
    from . import inspect, save
    from . import patch as install
    from .checkpoint import free
    from .detect import threshold_of
    from .parallel import leads

    free(out, model, force)
    plan = plan or _find(model, given, force=force)
    with install(model, plan):
        after = inspect(model, given["images"], threshold=threshold_of(plan), **_running(given))
        if leads():
            save(model, out, force=force)
    return plan, {"out": str(out), "plan": plan.to_dict(), "after": after.to_dict()}


def _holds_plan(file: Path) -> bool:
    from . import BadPlan, RegisterPlan

    try:
        RegisterPlan.load(file)
    except BadPlan:
        return False
    return True


def _load(
    model: str, given: Mapping[str, Any], *, patched: bool = False, check: Callable[[Any], Any] | None = None
) -> Any:
    import torch

    from .checkpoint import is_patched, load, load_base
    from .sources import existing

    images = given.get("images") or ()
    for path in [images] if isinstance(images, (str, Path)) else images:
        existing(path)  # a typo is told before anything slow
    device = given["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch says that a device is not there by either
        raise TestregError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    kwargs: dict[str, Any] = {"dtype": getattr(torch, given["dtype"])} if given["dtype"] else {}
    if check:
        kwargs["check"] = check
    loaded = load(model, **kwargs) if patched and is_patched(model) else load_base(model, **kwargs)
    return loaded.to(device)


def _load_both(
    model: str, plan_file: str | None, given: Mapping[str, Any], *, patched: bool = True, check: bool = True
) -> tuple[Any, Any]:
    """The model, and the plan, if any, which has to be of this model."""
    from . import RegisterPlan
    from .base import check_base

    plan = RegisterPlan.load(plan_file) if plan_file else None
    loaded = _load(model, given, patched=patched)
    if plan and check:
        check_base(plan, loaded)
    return loaded, plan


def _find(model: Any, given: Mapping[str, Any], *, force: bool) -> Any:
    from . import find as search

    names = ("threshold", "top_k", "registers", "form", "entry", "recipe")
    wanted = {name: given[name] for name in names if given.get(name) is not None}
    if given.get("blocks") is not None:
        wanted["blocks"] = _span(given["blocks"], "--blocks", "3-8")
    return search(model, given["images"], force=force, **wanted, **_running(given))


def _running(given: Mapping[str, Any]) -> dict[str, Any]:
    from .parallel import leads

    return {
        "batch_size": given["batch_size"],
        "workers": given["workers"] or 0,
        "progress": leads() and sys.stderr.isatty(),
    }


def _span(text: str, option: str, example: str) -> tuple[int, int]:
    """FIRST-LAST, or one number for both."""
    first, _, last = text.partition("-")
    numbers = first, last or first
    if not all(map(str.isdecimal, numbers)) or int(numbers[0]) > int(numbers[1]):
        raise click.BadParameter(f"{text!r} is not of the form FIRST-LAST, as in {example}.", param_hint=option)
    return int(numbers[0]), int(numbers[1])


def _print_json(values: Any) -> None:
    click.echo(json.dumps(values, indent=2))


def _say(*parts: str) -> None:
    click.echo("\n".join(part for part in parts if part))


from . import cli_export, cli_judging  # noqa: E402, F401 - add their commands to `main`
