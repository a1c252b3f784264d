"""The command line: each command a thin call of the package."""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..runtime import __version__
from ..runtime.errors import TestregError
from .console import Commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="testreg")
def main(debug: bool) -> None:
    """Test-time registers for pretrained Vision Transformers, without training.

    \b
    testreg inspect MODEL --images photos/              has it high-norm artefact patches?
    testreg inspect MODEL --text FILE                   has a language model attention sinks?
    testreg patch MODEL --images photos/ --out DIR      find, verify, save: the main job
    testreg patch MODEL --text FILE --out DIR           the same for a language model
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


GIVEN = "--family"  # what it describes is known by this name


class Place(click.Path):
    """A path of a file or folder; `~` is the home directory, also where the shell left it, as in `--out=~/plan`."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), parameter, context)


def _described(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """Know the family that `--family` describes, as long as the command runs."""
    if value is None:
        return
    from .. import FAMILIES, Family

    try:
        row: Any = ast.parse(f"Family({value})", mode="eval").body
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in row.keywords}
        family = Family(*map(ast.literal_eval, row.args), **named)
        if not all(isinstance(part, (str, tuple)) for part in (family.towers, family.blocks, family.down)):
            raise TypeError(value)
    except (SyntaxError, ValueError, TypeError, AttributeError) as error:
        raise click.BadParameter(
            f"{value!r} is no row of a family, as the error about a model of none prints it: "
            f'\'"GardenViT", "trunk", "shrink", "attn", prefix=1\'.'
        ) from error
    FAMILIES[GIVEN] = family if "package" in named else replace(family, package="transformers_modules")
    context.call_on_close(lambda: FAMILIES.pop(GIVEN, None))


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
loading = options(
    click.option("--device", help="Where to run, as torch names it: cpu, cuda, mps. Default: cuda where there is one."),
    click.option(
        "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Default: as in the checkpoint."
    ),
    click.option(
        "--trust-remote-code", is_flag=True, help="Run the Python code that a checkpoint brings: look at it first."
    ),
    click.option(
        "--family",
        callback=_described,
        expose_value=False,
        metavar="ROW",
        help="Describe a MODEL of no known family, by the row that its error prints.",
    ),
)
preparing = click.option(
    "--processor",
    help="How photos become inputs: a checkpoint that says it, or SIZE:MEAN:STD, as in 224:0.5:0.5. Default: MODEL's.",
)
IMAGES: dict[str, Any] = {"type": Place(), "help": "A folder of photos, or one; 16 to 64 are enough."}
running = options(
    click.option("--batch-size", type=click.IntRange(min=1), default=16, help="Photos at a time.", show_default=True),
    click.option("--workers", type=click.IntRange(min=0), help="Processes that decode photos. Default: this one."),
    preparing,
    loading,
)
with_plan = options(
    click.option(
        "--plan",
        "plan_file",
        type=Place(),
        help="Registers for MODEL: a file that `find --out` wrote, or owner/name on the hub.",
    ),
    click.option("--plans", help="Plans on the hub, owner/collection, among which MODEL's is found by its weights."),
)
photos = options(click.option("--images", required=True, **IMAGES), running)
tokenizing = click.option("--tokenizer", help="How text becomes tokens: a checkpoint that has it. Default: MODEL's.")
text_of = options(
    click.option(
        "--text",
        type=Place(path_type=Path),
        help="For a language model instead: a file or folder of text, 100 kB or more.",
    ),
    tokenizing,
)
photos_or_text = options(click.option("--images", **IMAGES), text_of, running)
OF_IMAGES = (
    "threshold", "blocks", "top_k", "registers", "form", "sizes", "entry", "recipe", "workers", "limit",
    "processor",
)  # fmt: skip
choices = options(
    click.option("--threshold", type=float, help="Norm from which on a patch is an outlier."),
    click.option("--blocks", help="Where register neurons may be: FIRST-LAST, from 0."),
    click.option("--top-k", type=int, help="Number of register neurons."),
    click.option("--registers", type=int, help="Number of registers."),
    click.option(
        "--form",
        type=click.Choice(["attention", "constant", "dynamic"]),
        help="Rows that attention alone sees, tokens that hold a constant, or tokens that get the neurons' maxima.",
    ),
    click.option(
        "--size",
        "sizes",
        type=click.IntRange(min=1),
        multiple=True,
        help="A side in pixels at which the plan shall hold too; may be given again. Default: a smaller and a larger.",
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
    from ..images.processors import chosen
    from ..images.sources import existing
    from ..images.takes import taken_by
    from ..runtime.decoders import find_decoder
    from ..runtime.modeling_testreg import load
    from ..text.streams import existing as existing_text
    from ..text.streams import tokenizer_named

    images = given.get("images") or ()
    for path in [images] if isinstance(images, (str, Path)) else images:
        existing(path)  # a typo is told before anything slow
    if isinstance(given.get("text"), Path):
        existing_text(given["text"])
    device = given["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch says that a device is not there by either
        raise TestregError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    kwargs: dict[str, Any] = {"dtype": getattr(torch, given["dtype"])} if given["dtype"] else {}
    check = check or (find_decoder if given.get("text") else None)
    if check:
        kwargs["check"] = check
    if patched and is_patched(model):
        loaded = load(model, **{name: value for name, value in kwargs.items() if name != "check"})
    else:
        loaded = load_base(model, **kwargs, trust_remote_code=given.get("trust_remote_code", False))
    if processor := given.get("processor"):
        loaded.image_processor = chosen(processor, loaded, taken_by(loaded))
    if tokenizer := given.get("tokenizer"):
        loaded.tokenizer = tokenizer_named(tokenizer)
    return loaded.to(device)


def load_both(
    model: str,
    plan_file: str | None,
    given: Mapping[str, Any],
    *,
    patched: bool = True,
    check: bool = True,
    holds: Callable[[Any], Any] | None = None,
) -> tuple[Any, Any]:
    """The model, and the plan, if any, which has to be of this model.

    Args:
        holds: raises where the model is none of those wanted.
    """
    from .. import RegisterPlan
    from ..runtime.fingerprint import check_base

    plans = given.get("plans")
    if plan_file and plans:
        raise click.UsageError("give either --plan, one plan, or --plans, a collection in which it is found.")
    plan = RegisterPlan.load(plan_file, force=not check) if plan_file else None
    if plan and plan.language:
        given = {**given, "text": given.get("text") or True}
    loaded = load_model(model, given, patched=patched, check=holds)
    if plan and check:
        check_base(plan, loaded)
    return loaded, RegisterPlan.load(plans, model=loaded) if plans else plan


def text_alone(images: Any, text: Path | None) -> bool:
    """Whether text is given, and not images; one of the two has to be, and no option of the other."""
    if (images is None) == (text is None):
        more = ", beside --plan too: the patched model is looked at on it" if named(("plan_file", "plans")) else ""
        raise click.UsageError(f"give either --images, for a vision tower, or --text, for a language model{more}.")
    foreign = ("tokenizer",) if text is None else OF_IMAGES
    if given := named(foreign):
        mine, other = ("--images", "--text") if text is None else ("--text", "--images")
        raise click.UsageError(f"{given} {'go' if ' and ' in given else 'goes'} with {other}, not with {mine}.")
    return text is not None


def named(options: Collection[str]) -> str:
    """Which of some options the command line has, as it has them."""
    context = click.get_current_context()
    asked = [
        option.opts[0]
        for option in context.command.params
        if option.name in options and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    ]
    return " and ".join([*filter(None, [", ".join(asked[:-1])]), *asked[-1:]])


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
