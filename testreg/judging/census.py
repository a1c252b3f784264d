"""`census`: many models looked at in one run, a row each, in a table that grows as it goes and is taken up again."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.sharing import has_plan
from ..finding.inspection import Inspection, inspect
from ..images.decode import files
from ..images.processors import chosen
from ..images.resized import at_side
from ..images.takes import taken_by
from ..runtime.errors import TestregError
from ..runtime.modeling_testreg import first_line
from .census_table import COLUMNS, KEY, TABLES, Row, markdown, read, write

__all__ = ["TABLES", "at", "census", "markdown", "named"]
OWN = "own"  # size: however the processor does it
FAILED, SPOILT, CLEAN = "failed", "artefact", "none"
NORM = "norm "  # what a threshold of one's own begins with
LONGEST = 200  # letters of a reason


def census(
    models: Iterable[str],
    images: str | Path,
    *,
    load: Callable[[str], nn.Module],
    out: Path | None = None,
    sizes: Sequence[int | None] = (None,),
    dtype: str | None = None,
    plans: tuple[str, ...] = (),
    tell: Callable[[str], Any] = lambda words: None,
    **running: Any,
) -> list[Row]:
    """Look at many models; what cannot be looked at is a row with its reason.

    Args:
        models: names of models, as `load` takes them.
        images: a folder of photos, or one.
        out: a table, written anew after every row; rows that it has of the same model, size, dtype, processor and
            photos are not made again, unless they failed.
        sizes: shorter sides of photos in pixels; None = the model's own.
        dtype: in which `load` loads; None = as in the checkpoint.
        plans: repositories of the hub in which a plan for each model is looked for.
        tell: gets a sentence before each model.
        running: see `inspect`.

    Returns:
        All rows of the table, those that were there first; keys are those of `COLUMNS`.

    Raises:
        TestregError: `out` is there and holds no such table, or cannot be written.
    """
    rows = {_key(row): row for row in read(out)} if out and out.exists() else {}
    same: Row = {"photos": _photos(images), "dtype": dtype, "processor": _processor(running.get("processor"))}
    threshold = running.get("threshold")
    for name in map(named, models):
        about: dict[int | None, Row] = {size: {"model": name, "size": _size(size), **same} for size in sizes}
        wanted = {size: row for size, row in about.items() if not _done(rows.get(_key(row)), threshold, plans)}
        for row in _lookedat(name, images, wanted, load, plans, tell, running):
            rows[_key(row)] = row
            if out:
                write(list(rows.values()), out)
    return list(rows.values())


def _lookedat(
    name: str,
    images: str | Path,
    wanted: Mapping[int | None, Row],
    load: Callable[[str], nn.Module],
    plans: tuple[str, ...],
    tell: Callable[[str], Any],
    running: Mapping[str, Any],
) -> Iterator[Row]:
    """Rows of one model: what is `wanted` of each size, filled in."""
    if not wanted:
        return
    tell(f"looking at {name}")
    empty: Row = dict.fromkeys(COLUMNS)
    try:
        model = load(name)
    except Exception as error:  # of a checkpoint that may be broken in any way
        yield from ({**empty, **row, "verdict": FAILED, "reason": _reason(error)} for row in wanted.values())
        return
    plan = _plan(name, model, plans, tell)
    for size, row in wanted.items():
        try:
            found = inspect(model, images, **{**running, **at(model, size, running.get("processor"))})
            yield {**empty, **row, **_told(found), "plan": plan}
        except Exception as error:  # the size may not fit, memory may not do
            yield {**empty, **row, "verdict": FAILED, "reason": _reason(error)}
    del model
    gc.collect()  # or two large ones would be there at once


def _plan(name: str, model: nn.Module, plans: tuple[str, ...], tell: Callable[[str], Any]) -> str | None:
    """The plan that there is for a model; what was seen of it stays where a repository cannot be had."""
    try:
        return has_plan(model, plans)
    except TestregError as error:
        tell(f"no plan was looked for, for {name}: {_reason(error)}")
        return None


def named(model: str) -> str:
    """What a model is called in a table: a directory with a slash behind it is the same directory."""
    return model.rstrip("/") or model


def at(model: nn.Module, size: int | None, processor: Any = None) -> dict[str, Any]:
    """The arguments of `inspect` with which photos have a shorter side of `size` pixels; None = as they are.

    Args:
        processor: None = the model's own.

    Raises:
        TestregError: the image processor does not say its own size.
    """
    if size is None:
        return {}
    processor = at_side(chosen(processor, model, taken_by(model)), size)
    if processor is None:
        raise TestregError("its image processor does not say its size, so no other can be set.")
    return {"processor": processor}


def _told(found: Inspection) -> Row:
    """What a row says of an inspection."""
    artefact, nature = found.artefact, found.nature
    row: Row = {
        "family": found.family,
        "verdict": CLEAN if artefact is None else SPOILT,
        "times": max(found.ratios),
        "threshold": str(found.threshold),
        "native": found.native,
    }
    if artefact is not None:
        row |= {"outliers": artefact.share, "images": artefact.images, "block": artefact.block}
        row |= {"times": found.ratios[artefact.shown]}
    if nature is not None:
        row |= {"where": nature.where, "states": nature.states}
        row |= {"values": nature.values, "attention": nature.attention}
    return row


def _key(row: Row) -> tuple[Any, ...]:
    """What a row was asked for; tables of earlier versions have no dtype and no processor, as who asks for none."""
    return tuple(row.get(name) for name in KEY)


def _done(row: Row | None, threshold: float | None, plans: tuple[str, ...]) -> bool:
    """Whether a row of a table says what is asked for; one of an own threshold, or without a plan that is, does not."""
    if row is None or row["verdict"] == FAILED or (plans and not row.get("plan")):
        return False
    said = str(row.get("threshold"))
    return said == f"{NORM}{threshold:g}" if threshold is not None else not said.startswith(NORM)


def _size(size: int | None) -> str:
    return OWN if size is None else str(size)


def _processor(given: Any) -> str | None:
    """A processor by its name, or what is known of one that is given loaded."""
    if given is None or isinstance(given, str):
        return given
    said = getattr(given, "to_json_string", given.__repr__)()
    return f"{type(given).__name__} ({hashlib.sha256(said.encode()).hexdigest()[:8]})"


def _photos(images: str | Path) -> str:
    """How many photos there are, and which: told by their names and lengths alone, since models read them anyway."""
    given = Path(images).expanduser()
    found = [path for path, named in files(given) if named] if given.is_dir() else [given]
    listed = sorted(f"{path.name} {path.stat().st_size}" for path in found)
    return f"{len(found)} ({hashlib.sha256(chr(10).join(listed).encode(errors='surrogateescape')).hexdigest()[:8]})"


def _reason(error: Exception) -> str:
    words = str(error).splitlines()[0] if isinstance(error, TestregError) else first_line(error)
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}..."
