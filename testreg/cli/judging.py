"""The commands that show what registers do: `evaluate`, `report` and `show`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from ..runtime.errors import BadImages
from . import words
from .console import wrapped, writable, writing
from .group import (
    Place,
    as_json,
    load_both,
    load_model,
    loading,
    main,
    named,
    preparing,
    print_json,
    say,
    span,
    text_alone,
    text_of,
    tokenizing,
    with_plan,
)

PERPLEXITY = "perplexity"
TASKS = (
    "outliers",
    "sinks",
    "agreement",
    "discovery",
    "attention",
    "probe",
    "depth",
    "segment-text",
    "classify",
    PERPLEXITY,
)


@main.command(short_help="Measure a model without and with registers.")
@click.argument("model")
@click.option("--data", type=Place(), required=True, help="A folder of photos with the task's labels; or text.")
@click.option("--task", type=click.Choice(TASKS), required=True, help="What to measure.")
@with_plan
@click.option("--against", multiple=True, help="Another checkpoint to compare with, as it is; may be given again.")
@click.option(
    "--baselines/--no-baselines", default=True, help="Judge the baselines of the protocol too.", show_default=True
)
@click.option("--quantise", help="Judge it in few bits too, simulated: w8a8, w6a6, w4a8, w4a4, w4a16, fp8 and so on.")
@click.option("--calibrate", type=Place(), help="quantise: photos for ranges. Default: every third photo of --data.")
@click.option("--per-channel", is_flag=True, help="quantise: one scale per output channel of a weight, not per weight.")
@click.option("--per-token", is_flag=True, help="quantise: one range per token, as it comes (dynamic), not per tensor.")
@click.option("--even", is_flag=True, help="quantise: even out channels in front of linears, as export --int8 does.")
@click.option("--clip", type=float, help="quantise: end ranges where this share of values lies inside, as in 0.9999.")
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first photos; or sequences, or tokens.")
@click.option("--window", type=click.IntRange(min=2), help="With perplexity: each token sees so many before it.")
@click.option("--skip", type=click.IntRange(min=1), help="With perplexity: leave out so many tokens first.")
@tokenizing
@click.option("--side", type=click.IntRange(min=16), help="Shorter side of photos in pixels. Default: the task's own.")
@click.option("--foreground", help="Mask values that are foreground: FIRST-LAST. Default: all but 0 and 255.")
@click.option(
    "--attention",
    type=click.Choice(["plain", "qk", "kk"]),
    help="With segment-text: the last block as it is, its attention alone, or keys that attend to keys.",
)
@click.option("--template", multiple=True, help="With segment-text: as in 'a photo of a {}.'; may be given again.")
@click.option("--sweep", is_flag=True, help="With discovery: also other blocks, features and biases, reported apart.")
@click.option("--out", multiple=True, type=Place(path_type=Path), help="Write the table here, as .json or .csv.")
@preparing
@loading
@as_json
def evaluate(
    model: str,
    data: str,
    task: str,
    plan_file: str | None,
    against: tuple[str, ...],
    baselines: bool,
    quantise: str | None,
    calibrate: str | None,
    limit: int | None,
    out: tuple[Path, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Measure MODEL without and with its registers, beside the baselines that tell what an effect is due to.

    \b
    outliers, sinks, agreement   any photos
    discovery                    photos with COCO JSON or VOC XML boxes
    attention, probe             photos with masks of the same names in a folder masks
    depth                        photos with depth maps in millimetres in a folder depths
    segment-text                 photos with masks, and mask_classes.json; a model that reads text
    classify                     one folder of photos per class
    perplexity                   text, of a language model

    MODEL is a patched checkpoint, or any other with --plan. Intervals hold 95 % and come from the same photos.

    \b
    testreg evaluate vit-clean --data photos/ --task discovery --out table.csv
    testreg evaluate vit-clean --data photos/ --task agreement --quantise w8a8
    """
    from .. import inspect as look
    from ..images.labels import photos as photos_of
    from ..judging.evaluation import TABLES
    from ..judging.evaluation import evaluate as judge
    from ..judging.quantise import Scheme
    from ..runtime.installer import active

    for path in out:
        writable(path, TABLES)
    textual = {name: given[name] for name in ("window", "skip") if given[name]}
    finer = {name: given[name] for name in ("per_channel", "per_token", "clip", "even") if given[name]}
    if quantise is None and (finer or calibrate):
        raise click.UsageError(f"--{min(finer, default='calibrate').replace('_', '-')} goes with --quantise.")
    if task == PERPLEXITY:
        if calibrate:
            raise click.UsageError("the task perplexity does not take --calibrate: ranges come from text behind.")
        if foreign := named(("against", "side", "foreground", "attention", "template", "sweep", "processor")):
            raise click.UsageError(f"the task perplexity does not take {foreign}.")
        textual |= {"quantise": quantise and Scheme.parse(quantise, **{"per_channel": True, **finer})}
        return _judge_text(model, data, plan_file, baselines, limit, out, as_json, textual, given)
    if foreign := named(("window", "skip", "tokenizer")):
        raise click.UsageError(f"the task {task} does not take {foreign}.")
    settings = {name: given[name] for name in ("side", "sweep", "attention", "template") if given[name]}
    if given["foreground"]:
        first, last = span(given["foreground"], "--foreground", "1-90")
        settings["foreground"] = range(first, last + 1)
    scheme = None if quantise is None else Scheme.parse(quantise, **finer)
    loaded, plan = load_both(model, plan_file, {**given, "images": data})
    table = judge(
        loaded,
        data,
        _task(task, settings),
        plan=plan,
        against={name: _other(name, given) for name in against},
        baselines=baselines,
        quantise=scheme,
        calibration=calibrate,
        limit=limit,
        progress=sys.stderr.isatty(),
    )
    for path in out:
        with writing(path) as file:
            table.save(file)
    if as_json:
        return print_json(table.to_dict())
    if not plan and not active(loaded):
        photos = [sample.path for sample in photos_of(data)[: limit or 64]]
        say(wrapped(look(loaded, photos).verdict), "")
    say(words.judged(str(data), table.provenance), str(table), *(f"Table in {path}." for path in out))


@main.command(short_help="One HTML page: before and after.")
@click.argument("model")
@click.option("--images", type=Place(), help="A folder of photos.")
@text_of
@with_plan
@click.option("--out", type=Place(path_type=Path), default="report.html", show_default=True)
@click.option("--limit", type=click.IntRange(min=1), default=64, show_default=True, help="Use only the first photos.")
@preparing
@loading
@as_json
def report(
    model: str,
    images: str | None,
    text: Path | None,
    plan_file: str | None,
    out: Path,
    limit: int,
    as_json: bool,
    **given: Any,
) -> None:
    """Show MODEL before and after on one HTML page that loads nothing from outside.

    \b
    testreg report vit-clean --images photos/ --out report.html
    testreg report smollm-clean --text docs/ --out report.html
    """
    from ..judging.reporting import report as write
    from ..judging.reporting import save

    writable(out)
    if text_alone(images, text):
        from ..judging.text_report import report_text

        loaded, plan = load_both(model, plan_file, {**given, "text": text})
        page = report_text(loaded, text, plan=plan)
    else:
        loaded, plan = load_both(model, plan_file, {**given, "images": images})
        page = write(loaded, images, plan=plan, most=limit)
    with writing(out) as file:
        save(page, file)
    if as_json:
        return print_json({"report": str(out)})
    say(f"Report in {out}.")


@main.command(short_help="Draw norm maps and attention before and after.")
@click.argument("model")
@click.argument("images", nargs=-1, required=True, type=Place())
@with_plan
@click.option("--out", type=Place(path_type=Path), default="before_after.png", show_default=True)
@preparing
@loading
@as_json
def show(model: str, images: tuple[str, ...], plan_file: str | None, out: Path, as_json: bool, **given: Any) -> None:
    """Draw patch norms and class-token attention of IMAGES, at most 12, before and after, side by side.

    \b
    testreg show vit-clean photos/one.jpg photos/two.jpg --out before_after.png
    """
    from ..judging.pictures import PICTURES
    from ..judging.pictures import show as draw

    writable(out, PICTURES)
    loaded, plan = load_both(model, plan_file, {**given, "images": images})
    figure = draw(loaded, plan, list(images))
    with writing(out) as file:
        figure.savefig(file, dpi=150)
    if as_json:
        return print_json({"picture": str(out)})
    say(f"Picture in {out}.")


def _judge_text(
    model: str,
    data: str,
    plan_file: str | None,
    baselines: bool,
    limit: int | None,
    out: tuple[Path, ...],
    as_json: bool,
    textual: Mapping[str, Any],
    given: Mapping[str, Any],
) -> None:
    from ..judging.perplexity import perplexity

    loaded, plan = load_both(model, plan_file, {**given, "text": Path(data)})
    bars = sys.stderr.isatty()
    table = perplexity(loaded, Path(data), plan=plan, baselines=baselines, limit=limit, progress=bars, **textual)
    for path in out:
        with writing(path) as file:
            table.save(file)
    if as_json:
        return print_json(table.to_dict())
    about = f"{table.provenance['tokens']} tokens of {data}"
    say(about, str(table), *(f"Table in {path}." for path in out))


def _other(name: str, given: Mapping[str, Any]) -> Any:
    """A model to compare with; `--processor` is for it too, where it has none of its own."""
    from ..images.processors import processor_for

    model = load_model(name, {**given, "processor": None}, patched=True)
    try:
        processor_for(model)
    except BadImages:
        return load_model(name, given, patched=True)
    return model


def _task(name: str, settings: dict[str, Any]) -> Any:
    from ..judging.tasks import TASKS

    foreign = sorted(settings.keys() - {field.name for field in fields(TASKS[name])})
    if foreign:
        raise click.UsageError(f"the task {name} does not take {' and '.join(f'--{key}' for key in foreign)}.")
    return TASKS[name](**settings)
