"""The pictures of the documentation: `python -m docs.pictures`, and with a CHECKPOINT those of docs/how.md too.

docs/rooms.svg is drawn from what the package says itself: the layers in pyproject.toml that `lint-imports` checks, and
the first words of each room. The others show the photos of scikit-image.
"""

import re
import sys
import textwrap
from html import escape
from importlib import import_module
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm

import testreg
from testreg.checkpoints import load_base
from testreg.demo.demonstration import demo_photos
from testreg.finding.observe import run
from testreg.images.streaming import stream
from testreg.judging.pictures import as_photo, clearest_block, views
from testreg.runtime.towers import find_tower

BEFORE, AFTER, QUIET = "#c4442f", "#2f6fc4", "#59636e"
DOCS = Path(__file__).parent
WIDTH, FLOOR, GAP, SIDE = 760, 72, 14, 44  # of docs/rooms.svg, in its units; SIDE is left of the floors
# Light boxes with dark words, and grey where there is none: readable on white and on black.
WORDS, LINES = "#1b1f24", "#7d8590"
FILLS = {
    "#dbe7f7": ("images", "text", "finding"),  # the way to a plan
    "#d3f0de": ("runtime", "checkpoints", "export"),  # a plan at work
    "#fbe7c6": ("metrics", "judging", "demo", "testing"),  # was it worth it, and right?
}


def floors():
    """The rooms of the package, the highest floor first, as the linter's contract has them."""
    (layers,) = re.findall(
        r"^layers = \[(.*?)\]", (DOCS.parent / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE
    )
    return [re.findall(r"testreg\.(\w+)", floor) for floor in re.findall(r'"(.*?)"', layers)]


def rooms(file):
    """The house: each floor a row, each room a box with the first words of what it says of itself."""
    house = floors()
    height = len(house) * (FLOOR + GAP) - GAP
    parts = [
        f'<path d="M14 4 V{height - 6} m-5 -8 l5 8 l5 -8" fill="none" stroke="{LINES}" stroke-width="2"/>',
        f'<text transform="translate(32 {height / 2}) rotate(-90)" text-anchor="middle" fill="{LINES}">imports</text>',
    ]
    for index, floor in enumerate(house):
        top, width = index * (FLOOR + GAP), (WIDTH - SIDE - GAP * (len(floor) - 1)) / len(floor)
        for place, room in enumerate(floor):
            left = SIDE + place * (width + GAP)
            fill = next((colour for colour, names in FILLS.items() if room in names), "#e6e8eb")
            told = import_module(f"testreg.{room}").__doc__
            first = re.search(r"Read `(\w+)`", told)[1]
            parts.append(f'<rect x="{left:.0f}" y="{top}" width="{width:.0f}" height="{FLOOR}" rx="6" fill="{fill}"/>')
            parts.append(_words(left + 14, top + 23, f"{room}/", 'font-weight="bold"'))
            parts.append(_words(left + width - 14, top + 23, f"read {first} first", 'text-anchor="end" font-size="11"'))
            for line, words in enumerate(
                textwrap.wrap(re.split(r"[:;.]\s", told)[0].rstrip(".").replace("->", "→"), width / 8)
            ):
                parts.append(_words(left + 14, top + 43 + 16 * line, words))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"'
    file.write_text(f'{head} font-size="13" role="img">\n' + "\n".join(parts) + "\n</svg>\n")


def _words(x, y, words, more=""):
    return f'<text x="{x:.0f}" y="{y}" fill="{WORDS}" {more}>{escape(words)}</text>'


def norms(before, after, file):
    """Largest and median patch norm after every block."""
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, seen, colour in (("unpatched", before, BEFORE), ("patched", after, AFTER)):
        axis.plot([block.largest for block in seen.blocks], color=colour, marker="o", label=f"largest, {name}")
        axis.plot([block.median for block in seen.blocks], color=colour, linestyle=":", label=f"median, {name}")
    axis.set(yscale="log", xlabel="after block", ylabel="norm of a patch", xticks=range(len(before.blocks)))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)


def neuron(model, found, photos, file):
    """Where one register neuron fires, beside the norms before and after."""
    tower, (block, index) = find_tower(model), max(found.pairs)
    batch = next(iter(stream(photos, model=model, batch_size=len(photos))))
    kept = []
    handle = tower.downs[block].register_forward_pre_hook(lambda module, args: kept.append(args[0][..., index]))
    run(model, batch.inputs)
    handle.remove()
    before = views(model, batch.inputs)
    shown = clearest_block(before)
    with testreg.patch(model, found):
        after = views(model, batch.inputs)
    size = before[0].norms.shape[1:]
    fires = kept[0][:, tower.prefix :].unflatten(1, size)  # (photos, rows, columns)
    figure, axes = plt.subplots(len(photos), 4, figsize=(8, 2.1 * len(photos)), squeeze=False, layout="constrained")
    titles = ("photo", f"neuron {index} of block {block}", f"norms after block {shown}", "the same, patched")
    scale = LogNorm(*(float(end(view.norms[shown].flatten() for view in before)) for end in (_least, _most)))
    for row, pixels in enumerate(batch.inputs["pixel_values"]):
        axes[row, 0].imshow(as_photo(pixels, stream(photos, model=model).processor))
        axes[row, 1].imshow(fires[row], cmap="inferno")
        for column, view in ((2, before[row]), (3, after[row])):
            axes[row, column].imshow(view.norms[shown], cmap="inferno", norm=scale)
            axes[row, column].set_xlabel(f"largest {view.norms[shown].max():.0f}", size=8, color=QUIET)
        axes[row, 1].set_xlabel(
            f"largest {fires[row].max():.0f}, median {fires[row].median():.2f}", size=8, color=QUIET
        )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, size=9)
    figure.savefig(file, dpi=120)


def _least(parts):
    return torch.cat(list(parts)).min()


def _most(parts):
    return torch.cat(list(parts)).max()


def main(*checkpoints):
    rooms(DOCS / "rooms.svg")
    for checkpoint in checkpoints:
        before_and_after(checkpoint)


def before_and_after(checkpoint):
    model, photos = load_base(checkpoint), demo_photos(48)
    found = testreg.find(model, photos)
    before = testreg.inspect(model, photos)
    with testreg.patch(model, found):
        after = testreg.inspect(model, photos)
    norms(before, after, DOCS / "norms.png")
    neuron(model, found, photos[:3], DOCS / "neuron.png")


if __name__ == "__main__":
    main(*sys.argv[1:2])
