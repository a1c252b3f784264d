"""The command line: each command a thin call of the package."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from ..runtime.errors import TestregError
from .console import Commands


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
with_plan = options(
    click.option(
        "--plan",
        "plan_file",
        type=click.Path(),
        help="Registers for MODEL: a file that `find --out` wrote, or owner/name on the hub.",
    ),
    click.option("--plans", help="Plans on the hub, owner/collection, among which MODEL's is found by its weights."),
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


def load_model(
    model: str, given: Mapping[str, Any], *, patched: bool = False, check: Callable[[Any], Any] | None = None
) -> Any:
    import torch

    from ..checkpoints.original import is_patched, load_base
    from ..images.sources import existing
    from ..runtime.modeling_testreg import load

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


def load_both(
    model: str, plan_file: str | None, given: Mapping[str, Any], *, patched: bool = True, check: bool = True
) -> tuple[Any, Any]:
    """The model, and the plan, if any, which has to be of this model."""
    from .. import RegisterPlan
    from ..runtime.fingerprint import check_base

    plans = given.get("plans")
    if plan_file and plans:
        raise click.UsageError("give either --plan, one plan, or --plans, a collection in which it is found.")
    plan = RegisterPlan.load(plan_file, force=not check) if plan_file else None
    loaded = load_model(model, given, patched=patched)
    if plan and check:
        check_base(plan, loaded)
    return loaded, RegisterPlan.load(plans, model=loaded) if plans else plan


def on_hub(plan: str) -> bool:
    """Whether a plan is given as a name on the hub."""
    from ..runtime.plan import ON_HUB

    return bool(ON_HUB.fullmatch(plan)) and not Path(plan).exists()


def running_with(given: Mapping[str, Any]) -> dict[str, Any]:
    from ..finding.parallel import leads

    return {
        "batch_size": given["batch_size"],
        "workers": given["workers"] or 0,
        "progress": leads() and sys.stderr.isatty(),
    }


def span(text: str, option: str, example: str) -> tuple[int, int]:
    """FIRST-LAST, or one number for both."""
    first, _, last = text.partition("-")
    numbers = first, last or first
    if not all(map(str.isdecimal, numbers)) or int(numbers[0]) > int(numbers[1]):
        raise click.BadParameter(f"{text!r} is not of the form FIRST-LAST, as in {example}.", param_hint=option)
    return int(numbers[0]), int(numbers[1])


def print_json(values: Any) -> None:
    click.echo(json.dumps(values, indent=2))


def say(*parts: str) -> None:
    click.echo("\n".join(part for part in parts if part))
