"""The command `export`: a patched model for where testreg is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import text_words, words
from .console import writable
from .group import Place, as_json, load_both, loading, main, preparing, print_json, say, with_plan


@main.command(short_help="Write a form that needs no testreg: stock weights, or ONNX.")
@click.argument("model")
@click.option("--format", "form", type=click.Choice(["stock", "onnx"]), required=True, help="What to write.")
@click.option(
    "--images", type=Place(), help="stock, of a ViT: a folder of photos to fit to and check with; 32 or more."
)
@with_plan
@click.option("--library", type=click.Choice(["transformers", "timm"]), help="stock: whose. Default: either.")
@click.option("--out", type=Place(path_type=Path), required=True, help="stock: a directory; onnx: NAME.onnx.")
@click.option("--replace", is_flag=True, help="Replace the checkpoint, or the file, that is there as --out.")
@click.option("--force", is_flag=True, help="Take another model's plan; write weights that drift, or no registers.")
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
    as_json: bool,
    **given: Any,
) -> None:
    """Write MODEL in a form that needs no testreg where it is used. MODEL is a patched one, or any with --plan.

    \b
    stock   weights alone, in an architecture of transformers or timm with register slots; of a
            language model, weights of its own class and a prefix for PEFT beside them
    onnx    for ONNX Runtime and other engines; any batch size

    \b
    testreg export vit-clean --format stock --images photos/ --out vit-stock
    testreg export vit-clean --format onnx --out vit-clean.onnx
    """
    from .. import BadPlan, active
    from .. import patch as install
    from ..runtime.guard import all_acting

    for name, value in {"--images": images, "--library": library, "--processor": given["processor"]}.items():
        if form == "onnx" and value:
            raise click.UsageError(f"--format onnx does not take {name}.")
    if form == "onnx":
        writable(out)
    loaded, plan = load_both(model, plan_file, {**given, "images": images}, check=not force)
    if plan:
        install(loaded, plan)
    speaks = next((acting.tower for acting in all_acting(loaded) if acting.plan.language), None)
    if speaks:
        from ..export.language import export_language

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
