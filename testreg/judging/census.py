"""`census`: many models looked at in one run, a row each, in a table that grows as it goes and is taken up again."""

from __future__ import annotations

import csv
import gc
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.atomic import replacing_file
from ..checkpoints.sharing import has_plan
from ..finding.inspection import Inspection, inspect
from ..images.decode import files
from ..images.processors import processor_for
from ..images.resized import at_side
from ..runtime.errors import TestregError
from ..runtime.modeling_testreg import first_line

TABLES = (".md", ".csv", ".json")  # how the names of tables end
OWN = "own"  # size: however the processor does it
FAILED, SPOILT, CLEAN = "failed", "artefact", "none"
NORM = "norm "  # what a threshold of one's own begins with
COLUMNS: Mapping[str, str] = {  # in Python, CSV and JSON -> in Markdown
    "model": "model",
    "size": "size",
    "verdict": "artefact?",
    "outliers": "outliers",
    "where": "kind",
    "states": "states",
    "times": "largest / median",
    "block": "from block",
    "values": "value norm",
    "attention": "attention there",
    "images": "photos with one",
    "native": "own registers",
    "plan": "plan",
    "threshold": "threshold",
    "family": "family",
    "photos": "photos",
    "reason": "reason",
}
LONGEST = 200  # letters of a reason
IN_WORDS = " times the median norm of an image"
SHARES = ("outliers", "images", "attention")  # of 1; per cent in Markdown
Row = dict[str, Any]


def census(
    models: Iterable[str],
    images: str | Path,
    *,
    load: Callable[[str], nn.Module],
    out: Path | None = None,
    sizes: Sequence[int | None] = (None,),
    plans: tuple[str, ...] = (),
    tell: Callable[[str], Any] = lambda words: None,
    **running: Any,
) -> list[Row]:
    """Look at many models; what cannot be looked at is a row with its reason.

    Args:
        models: names of models, as `load` takes them.
        images: a folder of photos, or one.
        out: a table, written anew after every row; rows that it has of the same model, size and photos are not made
            again, unless they failed.
        sizes: shorter sides of photos in pixels; None = the model's own.
        plans: repositories of the hub in which a plan for each model is looked for.
        tell: gets a sentence before each model.
        running: see `inspect`.

    Returns:
        All rows of the table, those that were there first; keys are those of `COLUMNS`.

    Raises:
        TestregError: `out` is there and holds no such table, or cannot be written.
    """
    rows = {_key(row): row for row in read(out)} if out and out.exists() else {}
    photos = _photos(images)
    threshold = running.get("threshold")
    for name in (name.rstrip("/") or name for name in models):
        done = {size: rows.get((name, _size(size), photos)) for size in sizes}
        wanted = [size for size, row in done.items() if not _done(row, threshold, plans)]
        for row in _lookedat(name, images, photos, wanted, load, plans, tell, running):
            rows[_key(row)] = row
            if out:
                write(list(rows.values()), out)
    return list(rows.values())


def _lookedat(
    name: str,
    images: str | Path,
    photos: str,
    sizes: Sequence[int | None],
    load: Callable[[str], nn.Module],
    plans: tuple[str, ...],
    tell: Callable[[str], Any],
    running: Mapping[str, Any],
) -> Iterator[Row]:
    if not sizes:
        return
    tell(f"looking at {name}")
    about: Row = {**dict.fromkeys(COLUMNS), "model": name, "photos": photos}
    try:
        model = load(name)
    except Exception as error:  # of a checkpoint that may be broken in any way
        yield from ({**about, "size": _size(size), "verdict": FAILED, "reason": _reason(error)} for size in sizes)
        return
    plan = _plan(name, model, plans, tell)
    for size in sizes:
        try:
            found = inspect(model, images, **{**running, **at(model, size)})
            yield {**about, "size": _size(size), **_told(found), "plan": plan}
        except Exception as error:  # the size may not fit, memory may not do
            yield {**about, "size": _size(size), "verdict": FAILED, "reason": _reason(error)}
    del model
    gc.collect()  # or two large ones would be there at once


def _plan(name: str, model: nn.Module, plans: tuple[str, ...], tell: Callable[[str], Any]) -> str | None:
    """The plan that there is for a model; what was seen of it stays where a repository cannot be had."""
    try:
        return has_plan(model, plans)
    except TestregError as error:
        tell(f"no plan was looked for, for {name}: {_reason(error)}")
        return None


def at(model: nn.Module, size: int | None) -> dict[str, Any]:
    """The arguments of `inspect` with which photos have a shorter side of `size` pixels; None = as they are.

    Raises:
        TestregError: the model's image processor does not say its own size.
    """
    if size is None:
        return {}
    processor = at_side(processor_for(model), size)
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
    if artefact is not None and nature is not None:
        row |= {"outliers": artefact.share, "images": artefact.images, "block": artefact.block}
        row |= {"times": found.ratios[artefact.shown], "where": nature.where, "states": nature.states}
        row |= {"values": nature.values, "attention": nature.attention}
    return row


def markdown(rows: Iterable[Row]) -> str:
    """Rows as a table for people, without columns that nobody fills."""
    rows = list(rows)
    columns = [name for name in COLUMNS if any(row.get(name) not in (None, "", 0, "0") for row in rows)]
    lines = [" | ".join(COLUMNS[name] for name in columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(_shown(name, row.get(name)) for name in columns) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def write(rows: list[Row], out: Path) -> None:
    """Write rows as Markdown, CSV or JSON, by the file's name; the file holds the old table or the new one, whole."""
    if out.suffix == ".md":
        text = markdown(rows)
    elif out.suffix == ".json":
        text = json.dumps([{name: row.get(name) for name in COLUMNS} for row in rows], indent=2) + "\n"
    else:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(COLUMNS), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    with replacing_file(out) as build:
        build.write_text(text, encoding="utf-8", newline="")


def read(out: Path) -> list[Row]:
    """Rows that `write` wrote.

    Raises:
        TestregError: the file holds something else.
    """
    try:
        text = out.read_text(encoding="utf-8")
        if out.suffix == ".md":
            rows = _from_markdown(text)
        else:
            rows = json.loads(text) if out.suffix == ".json" else list(csv.DictReader(io.StringIO(text)))
        if not all({"model", "size", "photos", "verdict"} <= row.keys() <= COLUMNS.keys() for row in rows):
            raise ValueError("it has other columns")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise TestregError(
            f"{out} is there and holds no census, so nothing was written: {first_line(error)}. Give another --out."
        ) from error
    return [{name: None if value == "" else value for name, value in row.items()} for row in rows]


def _from_markdown(text: str) -> list[Row]:
    names = {title: name for name, title in COLUMNS.items()}
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line.strip()]
    head, rule, *rest = lines
    if set("".join(rule)) != {"-"}:
        raise ValueError("it is no table")
    rows = [dict(zip((names[title] for title in head), line, strict=True)) for line in rest]
    return [{name: _parsed(name, cell) for name, cell in row.items()} for row in rows]


def _shown(name: str, value: Any) -> str:
    """A value in a cell, of which `_parsed` makes it again."""
    if value in (None, ""):
        return "-"
    if name in SHARES:
        return f"{100 * float(value):.{2 if name == 'outliers' else 0}f} %"
    if name == "threshold":
        return str(value).replace(IN_WORDS, " × median")
    if name in ("times", "values"):
        return f"{float(value):.3g}"
    return " ".join(str(value).split()).replace("|", "/")


def _parsed(name: str, cell: str) -> Any:
    if cell == "-":
        return None
    return float(cell.removesuffix(" %")) / 100 if name in SHARES else cell


def _key(row: Row) -> tuple[str, str, str]:
    return str(row["model"]), str(row["size"]), str(row["photos"])


def _done(row: Row | None, threshold: float | None, plans: tuple[str, ...]) -> bool:
    """Whether a row of a table says what is asked for; one of an own threshold, or without a plan that is, does not."""
    if row is None or row["verdict"] == FAILED or (plans and not row.get("plan")):
        return False
    said = str(row.get("threshold"))
    return said == f"{NORM}{threshold:g}" if threshold is not None else not said.startswith(NORM)


def _size(size: int | None) -> str:
    return OWN if size is None else str(size)


def _photos(images: str | Path) -> str:
    """How many photos there are, and which: told by their names and lengths alone, since models read them anyway."""
    given = Path(images).expanduser()
    found = [path for path, named in files(given) if named] if given.is_dir() else [given]
    listed = sorted(f"{path.name} {path.stat().st_size}" for path in found)
    return f"{len(found)} ({hashlib.sha256(chr(10).join(listed).encode()).hexdigest()[:8]})"


def _reason(error: Exception) -> str:
    words = str(error).splitlines()[0] if isinstance(error, TestregError) else first_line(error)
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}..."
