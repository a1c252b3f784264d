"""The commands that find and patch: `patch`, `find` and `inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..runtime.errors import BadPlan, TestregError, UnsupportedModel
from . import text_words, words
from .console import note, wrapped, writable, writing
from .group import (
    IMAGES,
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
    text_of,
    with_plan,
)


@main.command(short_help="Find, verify, save: the main job.")
@click.argument("model")
@photos_or_text
@choices
@with_plan
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
@click.option("--push", help="Share the plan on the hub, as owner/name or owner/name:FILE, with a card.")
@click.option("--explain", is_flag=True, help="Show the candidates and every plan tried.")
@click.option("--force", is_flag=True, help="Give the best plan even if the guard refuses it.")
@as_json
def find(
    model: str, out: Path | None, push: str | None, explain: bool, force: bool, as_json: bool, **given: Any
) -> None:
    """Find the register neurons of MODEL and the registers that take their place. The model is not changed.

    \b
    testreg find google/vit-base-patch16-224 --images photos/ --explain --out plan.safetensors
    testreg find HuggingFaceTB/SmolLM2-135M --text docs/ --out plan.safetensors

    Nothing needs to be set: what no option fixes is found.
    """
    from ..finding.parallel import leads
    from ..runtime.hub import sharing

    text_alone(given["images"], given["text"])
    writable(out)
    if out and out.is_file() and not _holds_plan(out):
        raise TestregError(f"{out} is there and holds no plan; nothing else is replaced. Give another --out.")
    repository, _, filename = (push or "").partition(":")
    if push is not None:
        try:
            sharing().check_names(repository, filename)
        except BadPlan as error:
            raise click.BadParameter(str(error), param_hint="--push") from error
    plan = _find(load_model(model, given), given, force=force)
    if out and leads():
        with writing(out) as file:
            plan.save(file)
    if push and leads():
        address = plan.push_to_hub(repository, filename=filename or None, force=force)
    if as_json:
        return print_json(plan.to_dict())
    told = plan.provenance
    said: Any = words if given["text"] is None else text_words
    explanation = said.explanation(told) if explain else ""
    say(words.paragraphs(said.plan(plan.to_dict()), explanation, said.guard(told)))
    if out and given["text"]:
        more = f"--tokenizer {given['tokenizer']} " if given["tokenizer"] else ""
        line = f"testreg patch {model} --text {given['text']} {more}--plan {out} --out DIRECTORY"
        say(f"\nPlan in {out}. Apply it:\n\n    {line}")
    elif out:
        more = f"--processor {given['processor']} " if given["processor"] else ""
        line = f"testreg patch {model} --images {given['images']} {more}--plan {out} --out DIRECTORY"
        say(f"\nPlan in {out}. Apply it:\n\n    {line}")
    if push and leads():
        apply = f"testreg patch {model} --images PHOTOS --plans {repository} --out DIRECTORY"
        say(f"\nPlan on the hub: {address}. Others apply it:\n\n    {apply}")


@main.command(short_help="Have models the artefact? Patch norms per block, or a table of many.")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--images", **IMAGES)
@text_of
@click.option("--threshold", type=float, help="Norm from which on a patch is an outlier.")
@click.option(
    "--size", "sizes", type=click.IntRange(min=1), multiple=True, help="Shorter side of photos; may be given again."
)
@click.option("--plans", multiple=True, help="With a table: whether these collections on the hub have a plan.")
@click.option("--out", type=Place(path_type=Path), help="A table of models, as .md, .csv or .json; taken up if there.")
@running
@as_json
def inspect(
    models: tuple[str, ...],
    images: str | None,
    text: Path | None,
    threshold: float | None,
    sizes: tuple[int, ...],
    plans: tuple[str, ...],
    out: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Patch norms of MODEL block by block, and whether it has the artefact. MODEL may be a patched one.

    \b
    testreg inspect google/vit-base-patch16-224 --images photos/

    Of several models, or with --out, a table with a row each. What cannot be looked at is a row with its reason; a
    table that is there is gone on with.

    \b
    testreg inspect MODEL MODEL --images photos/ --size 224 --size 448 --out census.md

    With --text instead of --images: attention sinks and massive activations of a causal language model.
    """
    from .. import inspect as look
    from ..judging.census import at as at_side

    many = len(models) > 1 or len(sizes) > 1 or bool(plans) or out is not None
    if text_alone(images, text):
        from ..runtime.decoders import find_blocks

        if many or sizes:
            raise click.UsageError("with --text one model is looked at, and neither --size, --plans nor --out fits.")
        loaded = load_model(models[0], {**given, "text": text}, patched=True, check=find_blocks)
        read = look(loaded, text=text, batch_size=given["batch_size"])
        return print_json(read.to_dict()) if as_json else say(text_words.sinks(read.to_dict()), wrapped(read.verdict))
    if many:
        return _census(models, str(images), threshold, sizes, plans, out, as_json, given)
    loaded = load_model(models[0], {**given, "images": images}, patched=True)
    found = look(
        loaded, images, threshold=threshold, **running_with(given), **(at_side(loaded, sizes[0]) if sizes else {})
    )
    if as_json:
        return print_json(found.to_dict())
    say(words.norms(found.to_dict()["blocks"]), f"An outlier has {found.threshold} or more; {found.images} photos.")
    say(wrapped(words.attention(found.to_dict()["attention"])), wrapped(found.verdict))
    if found.nature:
        say(wrapped(" ".join(found.nature.sentences)))


def _census(
    models: tuple[str, ...],
    images: str,
    threshold: float | None,
    sizes: tuple[int, ...],
    plans: tuple[str, ...],
    out: Path | None,
    as_json: bool,
    given: Mapping[str, Any],
) -> None:
    from ..images.sources import existing
    from ..judging import census

    writable(out, census.TABLES)
    existing(images)  # once, and not as many rows
    rows = census.census(
        dict.fromkeys(models),
        images,
        load=lambda name: load_model(name, given, patched=True),
        out=out,
        sizes=sizes or (None,),
        dtype=given["dtype"],
        plans=plans,
        tell=note,
        threshold=threshold,
        processor=given["processor"],
        **running_with(given),
    )
    mine = [row for row in rows if row["model"] in map(census.named, models)]
    if as_json:
        print_json(mine)
    else:
        say(census.markdown(rows).rstrip(), f"\nTable in {out}." if out else "")
    if all(row["verdict"] == census.FAILED for row in mine):
        raise TestregError("none of the models could be looked at; the table says why.")


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
