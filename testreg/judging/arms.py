"""The arms of an evaluation: the model without and with its registers, and the baselines that keep a report honest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..finding.as_tokens import as_tokens
from ..finding.detect import threshold_of
from ..finding.observe import NOTHING, observe, run
from ..finding.places import in_place
from ..finding.trial import Threshold
from ..images import processors
from ..images.streaming import stream
from ..images.takes import pixels, taken_by
from ..metrics.outliers import interpolate
from ..runtime.fitting import check
from ..runtime.installer import patch
from ..runtime.plan import RegisterPlan
from ..runtime.towers import Tower, find_tower
from .quantise import Scheme, quantised

UNPATCHED, PATCHED = "unpatched", "patched"
USUAL = Threshold(4.0)  # from which norm on a patch is an outlier, where no plan says


@dataclass(frozen=True)
class Arm:
    """A model in one state.

    Attributes:
        plan: the registers it has; None = as it comes, patched or not.
        repair: replace patches that are outliers by this threshold by their neighbours' mean, in what is read from the
            model. None = leave them.
        scheme: compute in few bits, calibrated on the photos `calibration`, at their size `side` (see `inputs`).
    """

    name: str
    model: nn.Module
    processor: Any
    plan: RegisterPlan | None = None
    repair: Threshold | None = None
    scheme: Scheme | None = None
    calibration: Sequence[Any] = ()
    side: int | None = None

    @property
    def tower(self) -> Tower:
        return find_tower(self.model)

    @contextmanager
    def on(self) -> Iterator[None]:
        """The model in this state, inside a `with`; as it was afterwards."""
        with ExitStack() as stack:
            if self.plan is not None:
                stack.enter_context(patch(self.model, self.plan))
            if self.scheme is not None:
                calibration = (self.inputs(path, self.side) for path in self.calibration)
                stack.enter_context(quantised(self.model, self.scheme, calibration))
            yield

    def inputs(self, path: Any, side: int | None = None, *, square: bool = False) -> Mapping[str, Tensor]:
        """One photo as model inputs.

        Args:
            side: pixels of the shorter side, with the whole photo in view and each side rounded to whole patches;
                None = however the processor does it.
            square: make both sides that long.

        Raises:
            BadImages: the photo cannot be read.
        """
        processor = self.processor if side is None else partial(self._resized, side, square)
        (batch,) = stream(path, processor, model=self.model, batch_size=1)
        return batch.inputs

    def _resized(self, side: int, square: bool, photo: Image.Image) -> Tensor:
        scale, size = side / min(photo.size), self.patch_size()
        width, height = (max(1, round((side if square else length * scale) / size)) * size for length in photo.size)
        resized = photo.resize((width, height), Image.Resampling.BICUBIC)
        made = processors.call(self.processor, resized, taken_by(self.model), do_resize=False, do_center_crop=False)
        image: Tensor = pixels(made)
        return image

    def patch_size(self) -> int:
        """Pixels of one patch's side: the stride of the first convolution."""
        stride = next(module.stride for module in self.tower.module.modules() if isinstance(module, nn.Conv2d))
        return int(stride[0])

    def features(self, inputs: Mapping[str, Tensor], wanted: list[tuple[str, int]]) -> list[Tensor]:
        """What the patches of one image are, each `(rows, columns, channels)` on the CPU, outliers repaired if so set.

        Args:
            wanted: pairs of "keys" (of all heads side by side), "attended" (what the attention gives, by itself) or
                "states" (the block's output), and the block.
        """
        tower = self.tower
        kinds = {kind: {block for of, block in wanted if of == kind} for kind in ("keys", "attended", "states")}
        # A block's attention is as its input is, so its outliers are those of the block before.
        stands_out = {(kind, block): max(block - 1, 0) for kind in ("keys", "attended") for block in kinds[kind]}
        stands_out |= {("states", block): block for block in kinds["states"]}
        states = kinds["states"] | set(stands_out.values())
        with observe(self.model, keys=kinds["keys"], attended=kinds["attended"], states=states) as seen:
            run(self.model, inputs)

        def patches(tokens: Tensor) -> Tensor:
            return in_place(tokens[0, tower.prefix :].float().cpu(), tower, inputs, 0)

        found = []
        for kind, block in wanted:
            tokens = patches(getattr(seen, kind)[block])
            if self.repair:
                tokens = interpolate(tokens, outlying(patches(seen.states[stands_out[kind, block]]), self.repair))
            found.append(tokens)
        return found

    def attention(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Last-block attention of the class token, mean over heads, `(rows, columns)`; without a class token, what each
        patch receives from the mean one. Outliers are repaired if so set.
        """
        last, tower = len(self.tower.blocks) - 1, self.tower
        with observe(self.model, attentions=[last], states=[max(last - 1, 0)]) as seen:
            run(self.model, inputs)
        maps = seen.attentions[last][0].float().mean(dim=0)  # (tokens, tokens)
        maps = (maps[:1] if tower.prefix else maps)[:, tower.prefix :].mean(dim=0).cpu()  # (patches,)
        maps = in_place(maps, tower, inputs)
        if not self.repair:
            return maps
        before = in_place(seen.states[max(last - 1, 0)][0, tower.prefix :].float().cpu(), tower, inputs, 0)
        return interpolate(maps[..., None], outlying(before, self.repair))[..., 0]


def outlying(states: Tensor, threshold: Threshold) -> Tensor:
    """Which patches of one image, `(rows, columns, channels)`, are outliers."""
    norms = states.norm(dim=-1)  # (rows, columns)
    return threshold.outliers(norms.flatten()).view_as(norms)


def arms(
    model: nn.Module,
    plan: RegisterPlan | None,
    *,
    processor: Any = None,
    against: Mapping[str, nn.Module] | None = None,
    baselines: bool = True,
    threshold: Threshold = USUAL,
) -> list[Arm]:
    """The unpatched model first, which the others are compared with; then patched, baselines, and other models.

    Args:
        plan: the registers to judge; None = there are none, and the unpatched model is judged alone.
        against: other models by name, as they come: saved patched checkpoints, siblings trained with registers.
        baselines: add the five of the protocol, which show what of an effect is due to what.
        threshold: which patches the neighbour interpolation repairs.

    Raises:
        BadPlan: the plan does not fit the model.
    """
    processor = processors.chosen(processor, model, taken_by(model))
    found = [Arm(UNPATCHED, model, processor, NOTHING)]
    if plan is not None:
        check(find_tower(model), plan)
        found.append(Arm(PATCHED, model, processor, plan))
        if baselines:
            found += [
                Arm("inert zero token", model, processor, _inert(find_tower(model))),
                Arm(
                    "neurons taken, no register",
                    model,
                    processor,
                    RegisterPlan(plan.neurons, registers=0, rest=plan.rest),
                ),
                Arm("random neurons instead", model, processor, random_neurons(find_tower(model), plan)),
                Arm("outliers interpolated", model, processor, NOTHING, repair=threshold),
            ]
    for name, other in (against or {}).items():
        found.append(Arm(name, other, processors.chosen(None, other, taken_by(other))))
    return found


CLIPPED = 0.9999  # of an image's values: the usual remedy against outliers


def in_few_bits(
    arms: Sequence[Arm], scheme: Scheme, photos: Sequence[Any], side: int | None, *, baselines: bool = True
) -> list[Arm]:
    """Arms of one model once more, quantised; and, as baselines of static ranges, what else could be done.

    These are the unpatched model with clipped ranges; and the same register neurons with registers that are tokens,
    which hold the outliers' mean state, or get the neurons' maxima.

    Args:
        arms: the first without, the others with registers, or without.
        photos, side: what ranges are calibrated on, and at which size.
    """
    narrow = partial(replace, calibration=photos, side=side)
    found = [narrow(arm, name=f"{arm.name}, {scheme}", scheme=scheme) for arm in arms]
    if not scheme.static or not baselines:
        return found
    clipped = replace(scheme, clip=CLIPPED, even=False)
    if scheme.clip is None:
        found.insert(1, narrow(arms[0], name=f"{arms[0].name}, {clipped}", scheme=clipped))
    for arm in arms[1:]:
        plan, tower = arm.plan, arm.tower
        if plan is None or plan.form != "attention" or not plan.neurons or tower.row.packed:
            continue
        forms = {"dynamic tokens": RegisterPlan(plan.neurons, registers=plan.registers)}
        if threshold_of(plan):
            inputs = (arm.inputs(path, side) for path in photos)
            forms = {"constant tokens": as_tokens(arm.model, plan, inputs), **forms}
        found += [narrow(arm, name=f"{name}, {scheme}", scheme=scheme, plan=form) for name, form in forms.items()]
    return found


def _inert(tower: Tower) -> RegisterPlan:
    """One register of zeros that nothing is moved to: a token, or, where none can join, a row in attention alone."""
    state = torch.zeros(len(tower.blocks), 1, tower.channels) if tower.row.packed else None
    return RegisterPlan({}, registers=1, state=state)


def random_neurons(tower: Tower, plan: RegisterPlan, seed: int = 0) -> RegisterPlan:
    """`plan` with as many other neurons of the same blocks in place of its own, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    neurons = {}
    for block, row in plan.neurons.items():
        order = torch.randperm(tower.neurons[block], generator=generator).tolist()
        neurons[block] = tuple(neuron for neuron in order if neuron not in row)[: len(row)]
    return RegisterPlan(neurons, registers=plan.registers, entry=plan.entry, state=plan.state)
