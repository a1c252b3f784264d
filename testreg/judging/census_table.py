"""The table of a census as Markdown, CSV or JSON; what is read is what was written, whatever models are called."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.atomic import replacing_file
from ..runtime.errors import TestregError
from ..runtime.modeling_testreg import first_line

TABLES = (".md", ".csv", ".json")  # how the names of tables end
COLUMNS: Mapping[str, str] = {  # in Python, CSV and JSON -> in Markdown
    "model": "model",
    "size": "size",
    "dtype": "dtype",
    "processor": "processor",
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
KEY = ("model", "size", "dtype", "processor", "photos")  # what a row was asked for
LONG, SHORT = " times the median norm of an image", " × median"  # of a threshold, in words and in Markdown
SHARES = ("outliers", "images", "attention")  # of 1; per cent in Markdown
NUMBERS: Mapping[str, Callable[[str], Any]] = {
    **dict.fromkeys((*SHARES, "times", "values"), float),
    **dict.fromkeys(("states", "block", "native"), int),
}
# Letters that end a line or a cell, or that Markdown takes for its own, and that one that would be read as such a code.
CODED = re.compile(r"[^\S ]|^ | $|(?<= ) |<|&(?=#?\w+;)")
Row = dict[str, Any]


def markdown(rows: Iterable[Row]) -> str:
    """Rows as a table for people, without columns that nobody fills."""
    rows = list(rows)
    columns = [name for name in COLUMNS if any(row.get(name) not in (None, "", 0) for row in rows)]
    lines = [" | ".join(COLUMNS[name] for name in columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(_cell(name, row.get(name)) for name in columns) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def write(rows: list[Row], out: Path) -> None:
    """Write rows as Markdown, CSV or JSON, by the file's name; the file holds the old table or the new one, whole."""
    kind = out.suffix.lower()
    if kind == ".md":
        text = markdown(rows)
    elif kind == ".json":
        text = json.dumps([{name: row.get(name) for name in COLUMNS} for row in rows], indent=2) + "\n"
    else:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(COLUMNS), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    with replacing_file(out) as build:  # a directory may have a name that is no UTF-8
        build.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def read(out: Path) -> list[Row]:
    """Rows that `write` wrote.

    Raises:
        TestregError: the file holds something else.
    """
    kind = out.suffix.lower()
    try:
        text = out.read_bytes().decode("utf-8-sig", "surrogateescape")  # spreadsheets put a mark before UTF-8
        parses: Mapping[str, Callable[[str], Any]] = {".json": json.loads, ".md": _from_markdown, ".csv": _from_csv}
        rows = parses[kind](text)
        if not all({"model", "size", "photos", "verdict"} <= row.keys() <= COLUMNS.keys() for row in rows):
            raise ValueError("it has other columns")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError, csv.Error) as error:
        raise TestregError(
            f"{out} is there and holds no census, so nothing was written: {first_line(error)}. Give another --out."
        ) from error
    return [{**dict.fromkeys(COLUMNS), **row} for row in rows]


def _from_csv(text: str) -> list[Row]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    return [{name: NUMBERS.get(name, str)(cell) if cell else None for name, cell in row.items()} for row in rows]


def _from_markdown(text: str) -> list[Row]:
    names = {title: name for name, title in COLUMNS.items()}
    lines = [
        line.strip().removeprefix("| ").removesuffix(" |").split(" | ") for line in text.splitlines() if line.strip()
    ]
    head, rule, *rest = lines
    if set("".join(rule)) != {"-"}:
        raise ValueError("it is no table")
    rows = [dict(zip((names[title] for title in head), line, strict=True)) for line in rest]
    return [{name: _value(name, cell) for name, cell in row.items()} for row in rows]


def _cell(name: str, value: Any) -> str:
    """A value in a cell of Markdown, of which `_value` makes it again."""
    if value in (None, ""):
        return "-"
    if name in SHARES:
        return f"{100 * value:.{2 if name == 'outliers' else 0}f} %"
    if NUMBERS.get(name) is float:
        return f"{value:.3g}"
    text = str(value).replace(LONG, SHORT) if name == "threshold" else str(value)
    text = CODED.sub(lambda found: f"&#{ord(found[0])};", text)
    return re.sub(r"[\\|]|^-$", r"\\\g<0>", text)


def _value(name: str, cell: str) -> Any:
    if cell == "-":
        return None
    if name in NUMBERS:
        return float(cell.removesuffix(" %")) / 100 if name in SHARES else NUMBERS[name](cell)
    text = re.sub(r"\\(.)", r"\1", cell)
    text = re.sub(r"&#(\d+);", lambda found: chr(int(found[1])), text)
    return text.replace(SHORT, LONG) if name == "threshold" else text
