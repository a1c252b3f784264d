"""The support table, made from the registry: `python -m docs.support` writes it into the pages that have it."""

from __future__ import annotations

from pathlib import Path

from testreg.runtime.families import FAMILIES, REFUSED, Family
from testreg.runtime.paths import each

DOCS = Path(__file__).parent
PAGES = (DOCS.parent / "README.md", DOCS / "families.md")
BEGIN, END = "<!-- support table: python -m docs.support -->", "<!-- end of support table -->"


def table() -> str:
    """Markdown: one line per family, then one per reason to refuse."""
    lines = [BEGIN, "| family | package | tower | blocks | second linear | prefix tokens | forms | mind |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, row in FAMILIES.items():
        cells = (each(row.towers)[0], each(row.blocks)[0], each(row.down)[0])
        tower, blocks, down = (f"`{cell}`" for cell in cells)
        package, forms = ", ".join(each(row.package)), "attention" if row.packed else "all"
        parts = (name, package, tower, blocks, down, _prefix(row), forms, _mind(row))
        lines.append(f"| {' | '.join(parts)} |")
    lines += ["", "| refused | because |", "|---|---|"]
    for reason in dict.fromkeys(REFUSED.values()):
        lines.append(f"| {', '.join(f'`{name}`' for name, why in REFUSED.items() if why == reason)} | {reason} |")
    return "\n".join([*lines, END])


def _prefix(row: Family) -> str:
    native = f"`{each(row.prefix_from)[0]}`" if row.prefix_from else ""
    return " + ".join(part for part in (str(row.prefix) if row.prefix or not native else "", native) if part)


def _mind(row: Family) -> str:
    notes = {
        "norm before the blocks": row.seed,
        "padding": row.padded,
        "rotary positions": row.rope or row.turn or row.positions,
        "position bias": row.bias,
        "tokens before images": row.sequence_first,
        "one sequence for all images": row.packed,
        "windows": row.window,
    }
    return ", ".join(note for note, there in notes.items() if there)


def write() -> None:
    for page in PAGES:
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        page.write_text(before + table() + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    write()
