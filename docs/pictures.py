"""The pictures of docs/how.md: `python docs/pictures.py CHECKPOINT`, with the photos of scikit-image."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm

import testreg
from testreg.checkpoints.saving import load_base
from testreg.demo.demonstration import demo_photos
from testreg.finding.observe import run
from testreg.images.streaming import stream
from testreg.judging.pictures import as_photo, clearest_block, views
from testreg.runtime.towers import find_tower

BEFORE, AFTER, QUIET = "#c4442f", "#2f6fc4", "#59636e"
DOCS = Path(__file__).parent


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


def main(checkpoint):
    model, photos = load_base(checkpoint), demo_photos(48)
    found = testreg.find(model, photos)
    before = testreg.inspect(model, photos)
    with testreg.patch(model, found):
        after = testreg.inspect(model, photos)
    norms(before, after, DOCS / "norms.png")
    neuron(model, found, photos[:3], DOCS / "neuron.png")


if __name__ == "__main__":
    main(sys.argv[1])
