"""`bake`: a plan made of weights alone, in a stock architecture."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ...checkpoints.atomic import replacing
from ...checkpoints.card import metadata
from ...checkpoints.original import load_base
from ...checkpoints.saving import free, source_files
from ...finding.as_tokens import as_tokens
from ...images.processors import chosen
from ...images.streaming import stream
from ...images.takes import taken_by
from ...runtime import fingerprint as base
from ...runtime.errors import BadCheckpoint, BadImages, BadPlan, Harmful
from ...runtime.fitting import check
from ...runtime.installer import active
from ...runtime.modeling_testreg import load
from ...runtime.plan import RegisterPlan
from ...runtime.towers import find_tower
from . import of_timm, stock
from .drift import Drift, measure
from .fit import fit, slots, trajectory

CALIBRATION, HELD_OUT = 32, 64  # images that weights are fitted to, and others that the result is measured on
FEWEST = 8
OUTLIER = 3.0  # times the median norm: no patch may reach it, except where the run-time patch leaves it too
ALIKE = 0.99  # cosine with the run-time patch, of patch features and of answers


@dataclass(frozen=True)
class Baked:
    """A model whose weights alone do what a patch does.

    Attributes:
        model: a copy with edited weights, in its own architecture, which still lacks the register slots.
        registers: what the slots hold `(registers, channels)`.
        plan: what is baked.
        library: who has the stock architecture, "transformers" or "timm".
        drift: measured on held-out images.
    """

    model: nn.Module
    registers: Tensor
    plan: RegisterPlan
    library: str
    drift: Drift
    processor: Any = None

    def stock(self) -> Any:
        """The model in the stock architecture: of transformers, or of timm where that is installed."""
        tower = find_tower(self.model)
        if self.library == "transformers":
            return stock.to_transformers(self.model, tower, self.registers)
        if tower.family in of_timm.SLOTS:
            return of_timm.with_slots(self.model, tower, self.registers)
        import timm

        weights, config = stock.to_timm(self.model, tower, self.registers)
        built = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
        built.load_state_dict(weights)
        return built.eval()

    def save(self, directory: str | Path, *, replace: bool = False) -> Path:
        """Write a stock checkpoint; see `export_stock`."""
        target = free(directory, self.model, replace)
        try:
            with replacing(target) as build:
                self._write(build)
        except (OSError, SafetensorError) as error:
            raise BadCheckpoint(f"{directory} could not be written: {error}. What it held is untouched.") from error
        return target

    def _write(self, build: Path) -> None:
        tower = find_tower(self.model)
        if self.library == "transformers":
            stock.to_transformers(self.model, tower, self.registers).save_pretrained(build)
            if self.processor is not None:
                self.processor.save_pretrained(build)
        elif tower.family in of_timm.SLOTS:
            built = self.stock()
            of_timm.write(built, build, {"testreg": self.summary(), **stock.labels(self.model, built.num_classes)})
        else:
            weights, config = stock.to_timm(self.model, tower, self.registers, self.processor)
            config["testreg"] = self.summary()
            save_file(
                {name: weight.detach().contiguous().clone() for name, weight in weights.items()},
                build / "model.safetensors",
                metadata={"format": "pt"},
            )
            (build / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        self._card().save(build / "README.md")

    def summary(self) -> dict[str, Any]:
        """What was baked and how far it drifts, plain JSON values."""
        return {"plan": self.plan.to_dict(), "drift": asdict(self.drift)}

    def _card(self) -> ModelCard:
        model: Any = self.model
        name = base.name(model)
        files = source_files(model) if getattr(model, "config", None) is not None else {}
        data, licence = metadata(name, self.library, files.get("README.md"))
        load = (
            'AutoModel.from_pretrained("PATH_OR_HUB_NAME")  # from transformers'
            if self.library == "transformers"
            else 'timm.create_model("local-dir:PATH", pretrained=True)  # or "hf-hub:NAME"'
        )
        lines = [
            f"# {name or type(model).__name__} with registers in its weights",
            "",
            f"Test-time registers (Jiang et al., arXiv 2506.08010), made of weights alone by testreg, in an "
            f"architecture that has register slots: no code, nothing to install. {self.plan}.",
            "",
            "```python",
            f"model = {load}",
            "```",
            "",
            f"Measured {self.drift}.",
            "",
            "```json",
            json.dumps(self.summary(), indent=1),
            "```",
            "",
            f"Licence: that of the base model{f', {licence}' if licence else ', whose card did not say which'}.",
            "",
        ]
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))


def bake(
    model: nn.Module,
    plan: RegisterPlan | str | Path,
    images: Any,
    *,
    processor: Any = None,
    library: str | None = None,
    batch_size: int = 16,
    force: bool = False,
) -> Baked:
    """Make the weights of a copy of `model` do what `plan` does, for an architecture with register slots.

    Args:
        model: a ViT, DeiT, CLIP, SigLIP or DINOv2 of transformers, alone or under a head, or a VisionTransformer or Eva
            of timm, as `timm.create_model` made it. A patch on it is left out.
        plan: of any form; slots hold tokens, so one of the attention form is baked as what it stands for, tokens with
            the outliers' mean state. Where registers fire register neurons themselves, their mean state after each such
            block is baked, which for dynamic ones takes the place of what the image says.
        images: at least 8 different ones, unlabelled; see `testreg.images.stream`. Every other one is held out, and the
            first 32 and 64 of the two halves are used.
        processor: by default the one that lies with the checkpoint.
        library: "transformers" or "timm", where both have the architecture.
        force: return a result that drifts too far, instead of raising.

    Returns:
        The result, on the CPU and in the precision of `model`.

    Raises:
        UnsupportedModel: no stock architecture with register slots is like the model.
        BadPlan: the plan does not fit the model, or names no neurons.
        BadImages: there are too few.
        Harmful: patches are still outliers, or the features are not those of the run-time patch; with the numbers.
    """
    plan = RegisterPlan.of(plan)
    tower = find_tower(model)
    library = stock.library_for(tower, library)
    check(tower, plan)
    if not plan.neurons or not plan.registers:
        raise BadPlan("the plan has no register neurons or no registers, so there is nothing to bake: find it first.")
    if plan.state is not None and not plan.state.norm(dim=-1).all():
        raise BadPlan("a register of the plan holds zeros, which have no direction that weights could write.")
    if plan.state is None and min(plan.neurons) == len(tower.blocks) - 1:
        raise BadPlan("the plan's neurons are in the last block only, behind which no token sees a register.")
    calibration, held_out = _halves(model, images, processor, batch_size)
    original = copy.deepcopy(model).eval().to("cpu", torch.float32)
    while (acting := active(original)) is not None:
        acting.remove()
    plan = as_tokens(original, plan, calibration)
    states = trajectory(original, plan, calibration)
    baked = copy.deepcopy(original)
    registers = fit(baked, plan, states, calibration)
    seed: Any = find_tower(baked).seed
    with torch.no_grad():
        joined = registers if seed is None else seed(registers)
    drift = measure(original, plan, baked, slots(joined), held_out, max(max(states), 0))
    if not force:
        _judge(drift)
    dtype = next(model.parameters()).dtype
    return Baked(baked.to(dtype), registers.to(dtype), plan, library, drift, _processor(model, processor))


def export_stock(
    model: nn.Module | str | Path,
    images: Any,
    out: str | Path,
    *,
    plan: RegisterPlan | str | Path | None = None,
    processor: Any = None,
    library: str | None = None,
    batch_size: int = 16,
    force: bool = False,
    replace: bool = False,
) -> Baked:
    """Bake a patched model and write it as a checkpoint of transformers or timm that needs no code of ours.

    Args:
        model: a patched model, the directory or hub name of one that `testreg.save` wrote, or any model with `plan`.
        images, processor, library, batch_size, force: see `bake`.
        out: the directory; killed at any moment, it holds what it held before or the whole checkpoint.
        replace: overwrite a checkpoint that `out` holds.

    Returns:
        What was written, with its drift.

    Raises:
        BadPlan: the model has no patch, and no plan was given.
        BadCheckpoint: `out` is in use or cannot be written; and all that `bake` raises.
    """
    loaded: Any = model
    if not isinstance(model, nn.Module):
        loaded = load_base(model) if plan is not None else load(model)
    acting = active(loaded)
    if plan is None and acting is None:
        raise BadPlan(f"{type(loaded).__name__} is not patched: give the plan (--plan FILE), or patch it first.")
    plan = acting.plan if plan is None and acting else RegisterPlan.of(plan)
    free(out, loaded, replace)  # before minutes of work
    baked = bake(loaded, plan, images, processor=processor, library=library, batch_size=batch_size, force=force)
    baked.save(out, replace=replace)
    return baked


def _halves(model: nn.Module, images: Any, processor: Any, batch_size: int) -> tuple[Any, Any]:
    """Every other of the different images to fit to, the rest to measure on: two lists of batches."""
    seen: set[str] = set()
    halves: tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]] = ([], [])
    counts = [0, 0]
    batches = stream(images, processor, model=model, batch_size=batch_size)
    for batch in batches:
        rows: tuple[list[int], list[int]] = ([], [])
        for row, digest in enumerate(batch.digests):
            half = len(seen) % 2
            if digest not in seen and counts[half] < (CALIBRATION, HELD_OUT)[half]:
                rows[half].append(row)
                counts[half] += 1
            seen.add(digest)
        for half in (0, 1):
            if rows[half]:
                halves[half].append({name: value[rows[half]] for name, value in batch.inputs.items()})
        if counts == [CALIBRATION, HELD_OUT]:
            break
    batches.warn()
    if sum(counts) < FEWEST:
        raise BadImages(
            f"{sum(counts)} different images are too few to fit weights and to check them: give {FEWEST} or more."
        )
    return halves


def _judge(drift: Drift) -> None:
    reasons = []
    if drift.outlier >= OUTLIER and drift.outlier > 1.1 * drift.outlier_patched:
        reasons.append("patches are still outliers")
    if drift.patches < ALIKE or drift.answer_patched < ALIKE:
        reasons.append(f"a cosine with the run-time patch is below {ALIKE}")
    if reasons:
        raise Harmful(
            f"weights alone do not do here what the patch does ({' and '.join(reasons)}): {drift}. Keep the patch in a "
            f"checkpoint with code (testreg.save), or pass force=True (--force) to take it all the same."
        )


def _processor(model: nn.Module, given: Any) -> Any:
    try:
        return chosen(given, model, taken_by(model))
    except BadImages:
        return None  # a stock checkpoint without one is as complete as the checkpoint that it comes from
