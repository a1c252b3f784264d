"""The commands that find and patch: `patch`, `find` and `inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..runtime.errors import TestregError, UnsupportedModel
from . import text_words, words
from .console import note, wrapped, writable, writing
from .group import (
    IMAGES,
    TEXT,
    Place,
    as_json,
    choices,
    load_both,
    load_model,
    main,
    photos_or_text,
    print_json,
    running,
    running_with,
    say,
    span,
    text_alone,
)


@main.command(short_help="Find, verify, save: the main job.")
@click.argument("model")
@photos_or_text
@choices
@click.option("--plan", "plan_file", type=Place(), help="Use this plan, as `find --out` wrote it.")
@click.option("--out", type=Place(path_type=Path), required=True, help="Directory of the patched checkpoint.")
@click.option("--replace", is_flag=True, help="Replace the checkpoint that is there as --out.")
@click.option("--force", is_flag=True, help="Take another model's plan; save even if the guard refuses.")
@as_json
def patch(
    model: str, out: Path, plan_file: str | None, replace: bool, force: bool, as_json: bool, **given: Any
) -> None:
    """Find the register neurons of MODEL, verify the patch on held-out photos, and save the patched model.

    \b
    testreg patch google/vit-base-patch16-224 --images photos/ --out vit-clean
    testreg patch HuggingFaceTB/SmolLM2-135M --text docs/ --out smollm-clean

    Nothing needs to be set: what no option fixes is found.
    """
    text_alone(given["images"], given["text"])
    taken = out.is_dir() and any(out.iterdir())
    loaded, plan = load_both(model, plan_file, given, patched=False, check=not force)
    _, told = patch_and_save(loaded, plan, out, given, replace=replace or force, force=force)
    if taken and not replace:
        note(f"--force has replaced what {out} held, as in version 0.1; the option for that alone is --replace.")
    if as_json:
        return print_json(told)
    say(words.patched(told) if given["text"] is None else text_words.patched(told))


@main.command(short_help="Find register neurons and registers, and save them as a plan.")
@click.argument("model")
@photos_or_text
@choices
@click.option("--out", type=Place(path_type=Path), help="Write the plan here, a safetensors file of a few kB.")
@click.option("--explain", is_flag=True, help="Show the candidates and every plan tried.")
@click.option("--force", is_flag=True, help="Give the best plan even if the guard refuses it.")
@as_json
def find(model: str, out: Path | None, explain: bool, force: bool, as_json: bool, **given: Any) -> None:
    """Find the register neurons of MODEL and the registers that take their place. The model is not changed.

    \b
    testreg find google/vit-base-patch16-224 --images photos/ --explain --out plan.safetensors
    testreg find HuggingFaceTB/SmolLM2-135M --text docs/ --out plan.safetensors

    Nothing needs to be set: what no option fixes is found.
    """
    from ..finding.parallel import leads

    text_alone(given["images"], given["text"])
    writable(out)
    if out and out.is_file() and not _holds_plan(out):
        raise TestregError(f"{out} is there and holds no plan; nothing else is replaced. Give another --out.")
    plan = _find(load_model(model, given), given, force=force)
    if out and leads():
        with writing(out) as file:
            plan.save(file)
    if as_json:
        return print_json(plan.to_dict())
    told = plan.provenance
    said: Any = words if given["text"] is None else text_words
    explanation = said.explanation(told) if explain else ""
    say(words.paragraphs(said.plan(plan.to_dict()), explanation, said.guard(told)))
    if out and given["text"]:
        line = f"testreg patch {model} --text {given['text']} --plan {out} --out DIRECTORY"
        say(f"\nPlan in {out}. Apply it:\n\n    {line}")
    elif out:
        more = f"--processor {given['processor']} " if given["processor"] else ""
        line = f"testreg patch {model} --images {given['images']} {more}--plan {out} --out DIRECTORY"
        say(f"\nPlan in {out}. Apply it:\n\n    {line}")


@main.command(short_help="Has a model the artefact? Patch norms per block.")
@click.argument("model")
@click.option("--images", **IMAGES)
@click.option("--text", **TEXT)
@click.option("--threshold", type=float, help="Norm from which on a patch is an outlier.")
@running
@as_json
def inspect(
    model: str, images: str | None, text: Path | None, threshold: float | None, as_json: bool, **given: Any
) -> None:
    """Patch norms of MODEL block by block, and whether it has the artefact. MODEL may be a patched one.

    \b
    testreg inspect google/vit-base-patch16-224 --images photos/

    With --text instead of --images: attention sinks and massive activations of a causal language model.
    """
    from .. import inspect as look

    if text_alone(images, text):
        from ..runtime.decoders import find_blocks

        loaded = load_model(model, given, patched=True, check=find_blocks)
        read = look(loaded, text=text, batch_size=given["batch_size"])
        return print_json(read.to_dict()) if as_json else say(text_words.sinks(read.to_dict()), wrapped(read.verdict))
    found = look(
        load_model(model, {**given, "images": images}, patched=True), images, threshold=threshold, **running_with(given)
    )
    if as_json:
        return print_json(found.to_dict())
    say(words.norms(found.to_dict()["blocks"]), f"An outlier has {found.threshold} or more; {found.images} photos.")
    say(wrapped(words.attention(found.to_dict()["attention"])), wrapped(found.verdict))


def patch_and_save(
    model: Any, plan: Any, out: Path, given: Mapping[str, Any], *, replace: bool, force: bool = False
) -> tuple[Any, dict[str, Any]]:
    """The main job: find, verify, save. The plan, and what there is to tell."""
    from .. import inspect, save
    from .. import patch as install
    from ..checkpoints.saving import free
    from ..finding.detect import threshold_of
    from ..finding.parallel import leads

    free(out, model, replace)
    if type(model).__module__.startswith("transformers_modules."):
        raise UnsupportedModel(
            f"{type(model).__name__} is of the checkpoint's own code, which no patched checkpoint brings along: "
            f"`testreg find ... --out FILE` writes its plan, and testreg.patch(model, FILE) applies it in Python."
        )
    plan = plan or _find(model, given, force=force)
    with install(model, plan):
        if given.get("text"):
            after: Any = inspect(model, text=given["text"], batch_size=given["batch_size"])
        else:
            after = inspect(model, given["images"], threshold=threshold_of(plan), **running_with(given))
        if leads():
            save(model, out, replace=replace)
    return plan, {"out": str(out), "plan": plan.to_dict(), "after": after.to_dict()}


def _holds_plan(file: Path) -> bool:
    from .. import BadPlan, RegisterPlan

    try:
        RegisterPlan.load(file)
    except BadPlan:
        return False
    return True


def _find(model: Any, given: Mapping[str, Any], *, force: bool) -> Any:
    from .. import find as search

    names = ("threshold", "top_k", "registers", "form", "entry", "recipe")
    wanted = {name: given[name] for name in names if given.get(name) is not None}
    if given.get("sizes"):
        wanted["sizes"] = given["sizes"]
    if given.get("blocks") is not None:
        wanted["blocks"] = span(given["blocks"], "--blocks", "3-8")
    if given.get("text"):
        if wanted.get("recipe") == "auto":
            del wanted["recipe"]
        run = running_with(given)
        more = {name: run[name] for name in ("batch_size", "progress")}
        return search(model, text=given["text"], force=force, **wanted, **more)
    return search(model, given["images"], force=force, **wanted, **running_with(given))
