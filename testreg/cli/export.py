"""The command `export`: a patched model for where testreg is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import text_words, words
from .console import writable
from .group import Place, as_json, load_both, loading, main, options, preparing, print_json, say, with_plan

quantising = options(
    click.option("--int8", is_flag=True, help="onnx: in 8 bits, calibrated on --images. Needs no further option."),
    click.option(
        "--held-out", type=Place(), help="int8: other photos to check with. Default: every third of --images."
    ),
    click.option(
        "--target",
        type=click.Choice(["any", "vnni", "arm", "tensorrt"]),
        help="int8: where it will run. Default: right on any processor; vnni is wrong on x86 that has none.",
    ),
    click.option(
        "--operators", type=click.Choice(["linears", "all"]), help="int8: what to quantise. Default: linears."
    ),
    click.option(
        "--calibration",
        type=click.Choice(["minmax", "percentile", "entropy"]),
        help="int8: where ranges end. Default: minmax, at the extremes.",
    ),
    click.option("--per-tensor", is_flag=True, default=None, help="int8: one scale per weight, not per channel."),
    click.option("--keep", multiple=True, help="int8: layer or operator to leave in float, as in '*.0.mlp.*'; again."),
)
INT8 = ("target", "operators", "calibration", "per_tensor", "keep")


@main.command(short_help="Write a form that needs no testreg: stock weights, or ONNX.")
@click.argument("model")
@click.option("--format", "form", type=click.Choice(["stock", "onnx"]), required=True, help="What to write.")
@click.option(
    "--images", type=Place(), help="stock of a ViT, int8: photos to fit or calibrate on and to check with; 32 or more."
)
@with_plan
@click.option("--library", type=click.Choice(["transformers", "timm"]), help="stock: whose. Default: either.")
@click.option("--out", type=Place(path_type=Path), required=True, help="stock: a directory; onnx: NAME.onnx.")
@click.option("--replace", is_flag=True, help="Replace the checkpoint, or the file, that is there as --out.")
@click.option("--force", is_flag=True, help="Take another model's plan; write weights that drift, or no registers.")
@quantising
@preparing
@loading
@as_json
def export(
    model: str,
    form: str,
    images: str | None,
    plan_file: str | None,
    library: str | None,
    out: Path,
    replace: bool,
    force: bool,
    int8: bool,
    held_out: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Write MODEL in a form that needs no testreg where it is used. MODEL is a patched one, or any with --plan.

    With --int8, any: its registers are found on the photos to calibrate on.

    \b
    stock   weights alone, in an architecture of transformers or timm with register slots; of a
            language model, weights of its own class and a prefix for PEFT beside them
    onnx    for ONNX Runtime and other engines; any batch size

    \b
    testreg export vit-clean --format stock --images photos/ --out vit-stock
    testreg export vit-clean --format onnx --out vit-clean.onnx
    testreg export MODEL --format onnx --int8 --images photos/ --out vit-int8.onnx
    """
    from .. import BadPlan, active
    from .. import patch as install
    from ..export.language import export_language, speaking
    from ..runtime.decoders import towers_of

    if int8 and (form != "onnx" or images is None):
        raise click.UsageError("--int8 goes with --format onnx and needs --images: photos to calibrate on.")
    how = {name: given.pop(name) for name in INT8}
    how = {name: value for name, value in how.items() if value}
    foreign = {"--library": library} if int8 else {}
    if form == "onnx" and not int8:
        foreign = {"--images": images, "--library": library, "--processor": given["processor"]}
    for name, value in foreign.items():
        if value:
            raise click.UsageError(f"--format onnx{' --int8' * int8} does not take {name}.")
    if not int8 and (how or held_out):
        first = min(how, default="held_out").replace("_", "-")
        raise click.UsageError(f"--{first} goes with --int8.")
    if form == "onnx":
        writable(out)
    loaded, plan = load_both(model, plan_file, {**given, "images": images}, check=not force, holds=towers_of)
    if plan:
        install(loaded, plan)
    if speaks := speaking(loaded):
        if form == "onnx" or images or library:
            raise click.UsageError("a language model is exported by --format stock, without --images and --library.")
        written = export_language(loaded, speaks, out, replace=replace, force=force)
        told = {"out": str(out), "format": form, "difference": written.difference}
        return print_json(told) if as_json else say(text_words.stock(told))
    if form == "stock" and images is None:
        raise click.UsageError("--format stock needs --images: photos to fit the weights to, and others to check with.")
    if form == "stock":
        from ..export.bake import export_stock

        baked = export_stock(loaded, images, out, library=library, force=force, replace=replace)
        told = {"out": str(out), "format": form, "library": baked.library, **baked.summary()}
        return print_json(told) if as_json else say(words.stock(told))
    if int8:
        from ..export.int8 import export_int8
        from ..export.quantiser import Int8

        found = export_int8(loaded, images, out, held_out=held_out, how=Int8(**how), force=force, replace=replace)
        told = {"out": str(out), "format": form, "dtype": "int8", **found.to_dict()}
        return print_json(told) if as_json else say(words.int8(told))
    from ..export.onnx import export_onnx
    from ..finding.attending import native

    if not force and active(loaded) is None and not native(loaded):
        raise BadPlan(
            f"{model} has no registers: give --plan FILE, as `testreg find --out FILE` wrote it, or a MODEL that "
            f"`testreg patch` wrote. --force writes it as it is."
        )
    dtype = next(loaded.parameters()).dtype
    export_onnx(loaded, out, dtype=dtype, replace=replace)
    told = {"out": str(out), "format": form, "dtype": str(dtype).removeprefix("torch.")}
    return print_json(told) if as_json else say(f"ONNX in {out}: {told['dtype']}, checked against PyTorch.")
