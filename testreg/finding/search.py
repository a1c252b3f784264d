"""`find`: from images to a plan, with nothing to set."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from ..images.takes import pixels
from ..metrics import share as share_of
from ..runtime.errors import BadImages, BadPlan, Harmful, NoOutliers, TestregError
from ..runtime.fingerprint import describe
from ..runtime.guard import acting_in
from ..runtime.plan import MOST_REGISTERS, RegisterPlan
from ..runtime.towers import Tower, find_tower
from .attending import attending
from .choose import Search, Wanted
from .closer import glances
from .count import Counted
from .detect import Artefact, artefact, check_threshold, chosen, largest_ratio, table
from .nature import nature
from .scan import TRIED, Kept, Norms, Sample
from .sizes import Sizes
from .survey import Running, Survey, spelled_out
from .text_search import find_text
from .trial import Bench, Score, Threshold

if TYPE_CHECKING:
    from typing_extensions import Unpack

FEWEST = 6  # images: two to rank neurons, two to try plans, two for the guard
# What the guard allows, on images that no choice was made on:
MOST_LEFT = 0.05  # of the outliers
LEAST_COSINE, LEAST_FEATURES = 0.97, 0.95


@spelled_out
def find(
    model: nn.Module,
    images: Any = None,
    *,
    text: Any = None,
    tokenizer: Any = None,
    threshold: float | None = None,
    blocks: tuple[int, int] | None = None,
    top_k: int | None = None,
    registers: int | None = None,
    form: Literal["dynamic", "constant", "attention"] | None = None,
    entry: int | None = None,
    sizes: Sequence[int] | None = None,
    recipe: Literal["auto", "paper"] = "auto",
    force: bool = False,
    **running: Unpack[Running],
) -> RegisterPlan:
    """Find the register neurons of `model`, and the registers that take their place with the least change.

    Nothing needs to be set: 16 to 64 photos of any kind, without labels, are enough. The model is left as it was.

    Where `torch.distributed` is initialised, every process calls this with the same images and a copy of the model:
    each looks at its share, the first one decides, and all get the same plan. The command line does it under
    `torchrun -m testreg find` and `accelerate launch -m testreg find`.

    Args:
        model: a Vision Transformer or a causal language model, or a model that holds one, unpatched.
        images: see `testreg.images.stream`; at least 6 different ones.
        text: instead of images, for a causal language model or the one that a model holds: a text, a file or a folder
            of text (a `Path`), several of them, rows with a column "text", or token ids `(tokens,)` or `(sequences,
            tokens)`. 40,960 tokens are looked at, 1,536 are the fewest. Nothing else but `tokenizer`, `batch_size`,
            `force` and `progress` goes with it (see `testreg.finding.text_search.find_text`).
        tokenizer: by default the one that lies with the checkpoint that the model was loaded from; or the name of
            another one.
        processor: by default the one that lies with the checkpoint that the model was loaded from; another one, or
            its name, or the numbers of one, as in "224:0.5:0.5" (see `testreg.images.processors.named`).
        batch_size: images per forward pass.
        workers: processes that decode images.
        threshold: L2 norm in the residual stream from which on a patch is an outlier; by default, the distribution of
            norms says where outliers begin.
        blocks: first and last block where register neurons may be, counted from 0.
        top_k: how many register neurons.
        registers: how many tokens join the sequence.
        form: "dynamic", "constant" or "attention" registers, see `RegisterPlan`.
        entry: the block before which they join.
        sizes: sides in pixels at which the plan shall hold too; by default a smaller and a larger one than the model's
            own, where it takes others. None at all: `()`.
        recipe: "paper" = as published: neurons by mean activation at outliers, ten if `top_k` does not say otherwise,
            one dynamic register from the embeddings on (arXiv 2506.08010, section 4).
        force: return the plan even if the guard refuses it.
        progress: show progress bars.

    Returns:
        The plan; its `provenance` holds the candidates with their scores, every plan tried with what it left and
        changed, and the numbers of the guard.

    Raises:
        NoOutliers: there is nothing to patch; the message has the norms.
        Harmful: no plan removes the outliers without changing the model too much; the message has the numbers.
        BadImages, BadText, UnsupportedModel, BadPlan: what was given cannot be used.
    """
    wanted = Wanted(threshold, blocks, top_k, registers, form, entry, recipe, sizes)
    if text is not None:
        if images is not None or wanted != Wanted():
            raise TestregError(
                "text goes with tokenizer, batch_size, force and progress alone: all else is found, and images are for "
                "vision towers."
            )
        return find_text(
            model,
            text,
            tokenizer=tokenizer,
            batch_size=running.get("batch_size", Survey.batch_size),
            force=force,
            progress=running.get("progress", False),
        )
    if images is None:
        raise BadImages("give images, for a vision tower, or text=..., for a language model.")
    tower = find_tower(model)
    if acting_in(tower):
        raise TestregError("the model is patched already; take the patch off first: testreg.active(model).remove().")
    _check(wanted, tower)
    if tower.row.packed:
        wanted = replace(wanted, form="attention")
        running["batch_size"] = 1  # images of one sequence are told apart by being alone
    survey = Survey(model, tower, images, **running)

    def decide(counted: Counted) -> RegisterPlan:
        norms, sample = counted.norms, counted.sample
        if len(sample) < FEWEST:
            raise BadImages(
                f"{len(sample)} different images are too few: at least {FEWEST} are needed, 16 to 64 are best."
            )
        found = located(norms, chosen(norms, threshold))
        ranked, tried, held = split(sample, found)
        with tqdm(desc="plans tried", unit="", disable=not survey.progress) as bar:
            search = Search(
                model, tower, found, wanted, ranked=ranked, tried=tried, batch_size=survey.batch_size, step=bar.update
            )
            best = search.best()
            others = Sizes(model, tower, found, survey.batches, [*tried, *ranked], held, survey.batch_size, bar.update)
            fixed = registers is not None or recipe == "paper" or tower.row.packed
            more = range(0) if top_k is not None else search.blocks
            plan, measured = others.fitted(best, search.bench, () if fixed and sizes is None else sizes, more)
        closer = glances(model, tower, ranked, found)
        attention = attending(closer, tower, found)
        kind = nature(ranked, closer, found, attention)
        guard = Bench(model, tower, held, found.threshold, found.block, survey.batch_size, once=True)
        score = guard.score(plan)
        if not force:
            _refuse_harm(plan, score, guard.before)
        provenance = {
            "base": describe(model, plan.neurons),
            "images": {"count": norms.images, "skipped": counted.skipped, "digest": counted.digest},
            "sizes": measured,
            "split": {"ranked": len(ranked), "tried": len(tried), "held_out": len(held)},
            "resolution": None if tower.row.packed else _resolution(pixels(next(iter(sample)).inputs)),
            "artefact": found.to_dict(),
            "nature": None if kind is None else kind.to_dict(),
            "attention": None if attention is None else asdict(attention),
            "blocks": [asdict(row) for row in table(norms, found.threshold)],
            "outliers_per_image": search.ranking.per_image,
            "positions": list(search.ranking.positions),
            "candidates": [asdict(candidate) for candidate in search.candidates[:32]],
            "trials": [{**trial.summary(), "chosen": trial.plan is best} for trial in search.trials],
            "before": {"outlier_patches": guard.before, "same_top_1": 1.0, "output_cosine": 1.0, "patches_cosine": 1.0},
            "after": {
                "outlier_patches": score.left,
                "same_top_1": score.agreement,
                "output_cosine": score.cosine,
                "patches_cosine": score.features,
            },
            "guard": {**asdict(score), **_intervals(score)},
            "wanted": {key: value for key, value in asdict(wanted).items() if value is not None},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        return replace(plan, provenance=provenance)

    return survey.decide(decide)


def located(norms: Norms, threshold: Threshold) -> Artefact:
    """The artefact.

    Raises:
        NoOutliers: there is none.
    """
    found = artefact(norms, threshold)
    if found is None:
        ratios = largest_ratio(norms)
        block = int(ratios.argmax())
        wanted = f"above the {threshold} that was asked for " if threshold.norm else ""
        raise NoOutliers(
            f"no high-norm artefact {wanted}in {norms.images} images, so nothing to patch: the largest patch norm is "
            f"{float(ratios[block]):.1f} times the median of its image (after block {block}), where an artefact has a "
            f"group of patches apart from the others, at 3 to 50 times. Largest per block: "
            f"{' '.join(f'{float(ratio):.1f}' for ratio in ratios)}; as norms: "
            f"{' '.join(f'{float(norm):.3g}' for norm in norms.largest)}."
        )
    return found


def split(sample: Sample, found: Artefact) -> tuple[list[Kept], list[Kept], list[Kept]]:
    """Images for ranking neurons, for trying plans, and for the guard: no image twice, those with outliers dealt out.

    Raises:
        BadImages: too few have outliers.
    """
    images = sorted(sample, key=lambda image: not found.threshold.outliers(image.norms[found.shown]).any())
    spoilt = sum(bool(found.threshold.outliers(image.norms[found.shown]).any()) for image in images)
    if spoilt < 3:
        raise BadImages(
            f"{spoilt} of {len(images)} images have outlier patches, and three are the least: to "
            f"rank neurons, to try plans, and for the guard. Give more images."
        )
    dealt, rest = images[: 3 * TRIED], images[3 * TRIED :]
    ranked, tried, held = (dealt[hand::3] for hand in range(3))
    return ranked, tried, held + rest


def _intervals(score: Score) -> dict[str, list[float]]:
    """95 % intervals of what the guard saw: for other images of the kind."""
    same = share_of(round(score.agreement * score.images), score.images)
    reach = 1.96 * score.error
    return {
        "same_top_1_interval": [same.low, same.high],
        "output_cosine_interval": [score.cosine - reach, min(1.0, score.cosine + reach)],
    }


def _resolution(image: Tensor) -> list[int] | None:
    """Height and width of an image or a clip; None where images come as patches, `(images, patches, values)`."""
    return list(image.shape[-2:]) if image.ndim > 3 else None


def _check(wanted: Wanted, tower: Tower) -> None:
    last = len(tower.blocks) - 1
    for name, least, most in (
        ("top_k", 1, max(tower.neurons)),
        ("registers", 1, MOST_REGISTERS),
        ("entry", 0, last),
    ):
        if (value := getattr(wanted, name)) is not None and not _whole(value, least, most):
            raise BadPlan(f"{name} must be a whole number from {least} to {most}, not {value!r}.")
    for name, known in (("form", (None, "dynamic", "constant", "attention")), ("recipe", ("auto", "paper"))):
        if (value := getattr(wanted, name)) not in known:
            raise BadPlan(f"{name} must be one of {', '.join(filter(None, known))}, not {value!r}.")
    check_threshold(wanted.threshold)
    pair: Any = wanted.blocks
    if pair is not None:
        right = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(_whole(block, 0, last) for block in pair)
        if not right or pair[0] > pair[1]:
            raise BadPlan(f"blocks must be the first and the last block, each from 0 to {last}, not {pair!r}.")
    sides: Any = wanted.sizes
    if sides is not None and not (isinstance(sides, (tuple, list)) and all(_whole(side, 1, 2**15) for side in sides)):
        raise BadPlan(f"sizes must be sides in pixels, as in (160, 448), not {sides!r:.100}.")
    if tower.row.packed and (wanted.form in ("dynamic", "constant") or wanted.recipe == "paper"):
        raise BadPlan(
            f"{type(tower.module).__name__} packs the patches of all images into one sequence, in which a token would "
            f"belong to all of them: only form='attention' and recipe='auto' fit it."
        )
    if tower.row.packed and sides:
        raise BadPlan(
            f"{type(tower.module).__name__} takes each image at a size of its own, so sizes cannot be set: give images "
            f"of the sizes that matter."
        )
    if wanted.form == "constant" and wanted.entry == 0:
        raise BadPlan(
            "constant registers hold what outlier patches have inside the network, so entry must be 1 or more; only "
            "dynamic ones (form='dynamic') can join with the embeddings."
        )
    if wanted.recipe == "paper" and wanted.form in ("constant", "attention"):
        raise BadPlan("the published recipe has dynamic registers: leave form out, or take recipe='auto'.")


def _whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _refuse_harm(plan: RegisterPlan, score: Score, before: float) -> None:
    if score.left > MOST_LEFT * before:
        reason = f"leaves {score.left:.2%} of the patches outliers, of {before:.2%}"
    elif not (score.cosine >= LEAST_COSINE and score.features >= LEAST_FEATURES):  # as NaN is neither
        reason = (
            f"changes the model too much: cosine with the unpatched model {score.cosine:.3f} of the output (at least "
            f"{LEAST_COSINE} is allowed) and {score.features:.3f} of the ordinary patches (at least {LEAST_FEATURES})"
        )
    else:
        return
    raise Harmful(
        f"the best plan ({plan}) {reason}. Give more images, or another form or number of registers; force=True "
        f"(--force on the command line) takes the plan as it is."
    )
