"""A model that does the same to the same images every time that testreg looks: no dropout, no mask, no luck."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import RandomNumbers, UnsupportedModel
from ..runtime.paths import reach
from ..runtime.towers import Tower

SEED = 0
SHARDED = ("DTensor", "FlatParameter")  # classes of parameters that hold a part


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients and no compilation inside the `with`; every module's mode as it was afterwards.

    Raises:
        UnsupportedModel: the weights are sharded.
    """
    if any(type(weight).__name__ in SHARDED for weight in model.parameters()):
        raise UnsupportedModel(
            f"the weights of {type(model).__name__} are sharded over processes (fully_shard, FSDP or tensor parallel), "
            f"and finding reads them whole: find the plan on the model before it is sharded, in one process or with a "
            f"copy in each, and patch the sharded one with it."
        )
    modes = [(module, module.training) for module in model.modules()]
    if any(mode for _, mode in modes):
        model.eval()
    try:
        with torch.no_grad(), _as_written():
            yield
    finally:
        for module, mode in modes:
            if module.training is not mode:  # telling a module anything is slow, and there may be thousands
                module.training = mode


def _as_written() -> AbstractContextManager[Any]:
    """Compiled code runs as it is written inside the `with`.

    What looks inside a model would have it compiled anew for each look, and `fullgraph` allows no looking at all.
    """
    stance = getattr(torch.compiler, "set_stance", None)
    return stance("force_eager") if stance and "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def still(model: nn.Module, tower: Tower | None = None) -> Iterator[None]:
    """As `quiet`, and every patch is seen in its place, and whatever draws random numbers draws the same ones.

    The generators are afterwards as they were: who looks at a model on the way through a training changes nothing.

    Warns:
        RandomNumbers: numbers were drawn, so that what is seen is one case of many.
    """
    with ExitStack() as stack:
        stack.enter_context(quiet(model))
        if tower and tower.row.masking:
            stack.enter_context(_whole(tower, tower.row.masking))
        stack.enter_context(_drawn_alike(model))
        yield


@contextmanager
def _whole(tower: Tower, masking: str) -> Iterator[None]:
    """The method that drops random patches and shuffles the others (ViT-MAE's, in evaluation mode too) does neither."""
    path, _, name = masking.rpartition(".")
    owner = reach(tower.module, path) if path else tower.module
    before = vars(owner).get(name)
    setattr(owner, name, _unmasked)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _unmasked(sequence: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The patches `(batch, patches, channels)` as they are, which are masked `(batch, patches)`, and their order."""
    order = torch.arange(sequence.shape[1], device=sequence.device).expand(sequence.shape[:2])
    return sequence, torch.zeros(sequence.shape[:2], device=sequence.device), order


@contextmanager
def _drawn_alike(model: nn.Module) -> Iterator[None]:
    devices = {weight.device for weight in model.parameters()}
    cuda = [torch.cuda.default_generators[device.index] for device in devices if device.type == "cuda"]
    generators = [torch.default_generator, *cuda]
    before = [generator.get_state() for generator in generators]
    fixed = [generator.manual_seed(SEED).get_state() for generator in generators]
    try:
        yield
    finally:
        drawn = any(
            not torch.equal(generator.get_state(), state) for generator, state in zip(generators, fixed, strict=True)
        )
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
    if drawn:
        warnings.warn(
            f"{type(model).__name__} draws random numbers in evaluation mode too. testreg gives it the same ones at "
            f"every pass, so that results can be compared and repeated, but they hold for these numbers alone: where "
            f"the model has a setting that stops it, set that first.",
            RandomNumbers,
            stacklevel=2,
        )
