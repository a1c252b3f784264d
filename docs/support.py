"""The support table, made from the registry: `python -m docs.support` writes it into the pages that have it."""

from __future__ import annotations

from pathlib import Path

from testreg.runtime.families import FAMILIES, REFUSED, Family, each

DOCS = Path(__file__).parent
PAGES = (DOCS.parent / "README.md", DOCS / "families.md")
BEGIN, END = "<!-- support table: python -m docs.support -->", "<!-- end of support table -->"


def table() -> str:
    """Markdown: one line per family, then one per reason to refuse."""
    lines = [BEGIN, "| family | package | tower | blocks | second linear | prefix tokens | mind |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, row in FAMILIES.items():
        cells = (each(row.towers)[0], each(row.blocks)[0], each(row.down)[0])
        tower, blocks, down = (f"`{cell}`" for cell in cells)
        lines.append(f"| {name} | {row.package} | {tower} | {blocks} | {down} | {_prefix(row)} | {_mind(row)} |")
    lines += ["", "| refused | because |", "|---|---|"]
    for reason in dict.fromkeys(REFUSED.values()):
        lines.append(f"| {', '.join(f'`{name}`' for name, why in REFUSED.items() if why == reason)} | {reason} |")
    return "\n".join([*lines, END])


def _prefix(row: Family) -> str:
    native = f"`{row.prefix_from}`" if row.prefix_from else ""
    return " + ".join(part for part in (str(row.prefix) if row.prefix or not native else "", native) if part)


def _mind(row: Family) -> str:
    notes = {
        "norm before the blocks": row.seed,
        "padding": row.padded,
        "rotary positions": row.rope or row.positions,
        "position bias": row.bias,
    }
    return ", ".join(note for note, there in notes.items() if there)


def write() -> None:
    for page in PAGES:
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        page.write_text(before + table() + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    write()
