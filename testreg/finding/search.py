"""`find`: from images to a plan, with nothing to set."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from ..images.streaming import stream
from ..runtime.errors import BadImages, BadPlan, Harmful, NoOutliers, TestregError
from ..runtime.families import Tower, find_tower
from ..runtime.fingerprint import describe
from ..runtime.installer import active
from ..runtime.plan import MOST_REGISTERS, RegisterPlan
from .choose import Search, Wanted
from .count import Counted, count, quiet, total
from .detect import Artefact, artefact, check_threshold, chosen, largest_ratio, table
from .parallel import share, shared
from .scan import Kept, Norms, Sample
from .trial import Bench, Score, Threshold

FEWEST = 6  # images: two to rank neurons, two to try plans, two for the guard
# What the guard allows, on images that no choice was made on:
MOST_LEFT = 0.05  # of the outliers
LEAST_COSINE, LEAST_FEATURES = 0.97, 0.95


def find(
    model: nn.Module,
    images: Any,
    *,
    processor: Callable[..., Any] | None = None,
    batch_size: int = 16,
    workers: int = 0,
    threshold: float | None = None,
    blocks: tuple[int, int] | None = None,
    top_k: int | None = None,
    registers: int | None = None,
    form: Literal["dynamic", "constant"] | None = None,
    entry: int | None = None,
    recipe: Literal["auto", "paper"] = "auto",
    force: bool = False,
    progress: bool = False,
) -> RegisterPlan:
    """Find the register neurons of `model`, and the registers that take their place with the least change.

    Nothing needs to be set: 16 to 64 photos of any kind, without labels, are enough. The model is left as it was.

    Where `torch.distributed` is initialised, every process calls this with the same images and a copy of the model:
    each looks at its share, the first one decides, and all get the same plan. The command line does it under
    `torchrun -m testreg find` and `accelerate launch -m testreg find`.

    Args:
        model: a Vision Transformer, or a model that holds one, unpatched.
        images: see `testreg.images.stream`; at least 6 different ones.
        processor: by default the one that lies with the checkpoint that the model was loaded from.
        batch_size: images per forward pass.
        workers: processes that decode images.
        threshold: L2 norm in the residual stream from which on a patch is an outlier; by default, the distribution of
            norms says where outliers begin.
        blocks: first and last block where register neurons may be, counted from 0.
        top_k: how many register neurons.
        registers: how many tokens join the sequence.
        form: "dynamic" or "constant" registers, see `RegisterPlan`.
        entry: the block before which they join.
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
        BadImages, UnsupportedModel, BadPlan: what was given cannot be used.
    """
    tower = find_tower(model)
    if active(model):
        raise TestregError("the model is patched already; take the patch off first: testreg.active(model).remove().")
    wanted = Wanted(threshold, blocks, top_k, registers, form, entry, recipe)
    _check(wanted, tower)
    batches = stream(images, processor, model=model, batch_size=batch_size, workers=workers, share=share())

    def decide(parts: list[Counted]) -> RegisterPlan:
        counted = total(parts, batches)
        norms, sample = counted.norms, counted.sample
        if len(sample) < FEWEST:
            raise BadImages(
                f"{len(sample)} different images are too few: at least {FEWEST} are needed, 16 to 64 are best."
            )
        found = located(norms, chosen(norms, threshold))
        ranked, tried, held = split(sample, found)
        with tqdm(desc="plans tried", unit="", disable=not progress) as bar:
            search = Search(
                model, tower, found, wanted, ranked=ranked, tried=tried, batch_size=batch_size, step=bar.update
            )
            plan = search.best()
        guard = Bench(model, tower, held, found.threshold, found.block, batch_size)
        score = guard.score(plan)
        if not force:
            _refuse_harm(plan, score, guard.before)
        provenance = {
            "base": describe(model, plan.neurons),
            "images": {"count": norms.images, "skipped": counted.skipped, "digest": counted.digest},
            "split": {"ranked": len(ranked), "tried": len(tried), "held_out": len(held)},
            "resolution": _resolution(next(iter(sample)).inputs["pixel_values"]),
            "artefact": found.to_dict(),
            "blocks": [asdict(row) for row in table(norms, found.threshold)],
            "outliers_per_image": search.ranking.per_image,
            "positions": list(search.ranking.positions),
            "candidates": [asdict(candidate) for candidate in search.candidates[:32]],
            "trials": [{**trial.summary(), "chosen": trial.plan is plan} for trial in search.trials],
            "before": {"outlier_patches": guard.before, "same_top_1": 1.0, "output_cosine": 1.0, "patches_cosine": 1.0},
            "after": {
                "outlier_patches": score.left,
                "same_top_1": score.agreement,
                "output_cosine": score.cosine,
                "patches_cosine": score.features,
            },
            "guard": {**asdict(score), "images": len(held)},
            "wanted": {key: value for key, value in asdict(wanted).items() if value is not None},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        return replace(plan, provenance=provenance)

    with quiet(model):
        return shared(lambda: count(model, tower, batches, progress), decide)


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
    ranked, tried, held = (images[hand::3] for hand in range(3))
    return ranked, tried, held


def _resolution(pixels: Tensor) -> list[int] | None:
    """Height and width of the first image; None where images come as patches, `(images, patches, values)`."""
    return list(pixels.shape[-2:]) if pixels.ndim > 3 else None


def _check(wanted: Wanted, tower: Tower) -> None:
    last = len(tower.blocks) - 1
    for name, least, most in (
        ("top_k", 1, max(tower.neurons)),
        ("registers", 1, MOST_REGISTERS),
        ("entry", 0, last),
    ):
        if (value := getattr(wanted, name)) is not None and not _whole(value, least, most):
            raise BadPlan(f"{name} must be a whole number from {least} to {most}, not {value!r}.")
    for name, known in (("form", (None, "dynamic", "constant")), ("recipe", ("auto", "paper"))):
        if (value := getattr(wanted, name)) not in known:
            raise BadPlan(f"{name} must be one of {', '.join(filter(None, known))}, not {value!r}.")
    check_threshold(wanted.threshold)
    pair: Any = wanted.blocks
    if pair is not None:
        right = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(_whole(block, 0, last) for block in pair)
        if not right or pair[0] > pair[1]:
            raise BadPlan(f"blocks must be the first and the last block, each from 0 to {last}, not {pair!r}.")
    if wanted.form == "constant" and wanted.entry == 0:
        raise BadPlan(
            "constant registers hold what outlier patches have inside the network, so entry must be 1 or more; only "
            "dynamic ones (form='dynamic') can join with the embeddings."
        )
    if wanted.recipe == "paper" and wanted.form == "constant":
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
