"""`save_pretrained` writes a patched model without its registers: it says so while a patch is on.

A warning, since those who train a patched model save its weights on the way, and patch what they load again. A model
that was loaded with registers raises instead: its checkpoint would be another model.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import ref

from torch import nn

from .decoders import towers_of
from .errors import RegistersLeftOut, TestregError, UnsupportedModel
from .towers import Tower

PATCHES = "_testreg_patches"  # on the tower, so that a deepcopy of the model owns copies of its patches


def acting(model: nn.Module) -> Any:
    """The patch that acts on `model`, None where there is none."""
    return next(iter(all_acting(model)), None)


def all_acting(model: nn.Module) -> list[Any]:
    """The patches that act on `model`: one on its vision tower, one on its language model."""
    return [patch for tower in towers_of(model) if (patch := acting_in(tower)) is not None]


def acting_in(tower: Tower) -> Any:
    """The patch that acts in `tower`, None where there is none."""
    patches = getattr(tower.module, PATCHES, [])
    return patches[-1] if patches else None


class SavePretrained:
    """A model's own `save_pretrained`, with a word or an error while registers are on.

    Args:
        loaded: the model came with its registers.
    """

    def __init__(self, model: Any, *, loaded: bool = False):
        self.model, self.loaded = model, loaded

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        model = self.model
        if self.loaded and _patched(model):
            raise TestregError(
                "save_pretrained would lose this model's registers. Keep them with testreg.save(model, PATH), which "
                "takes push_to_hub=NAME too; or take them off first with testreg.active(model).remove()."
            )
        if _patched(model):
            warnings.warn(
                "save_pretrained writes this model without its registers. testreg.save(model, PATH) keeps them; or "
                "patch what you load again: testreg.patch(loaded, testreg.active(model).plan).",
                RegistersLeftOut,
                stacklevel=2,
            )
        type(model).save_pretrained(model, save_directory, *args, **kwargs)


class Guard:
    """Puts `SavePretrained` on a model that has such a method.

    It holds the model weakly: a patch lies on the tower, and who keeps or copies the tower does not want the rest.
    """

    def __init__(self, model: nn.Module | None):
        self.model: Any = (lambda: None) if model is None else ref(model)

    def on(self) -> None:
        model = self.model()
        if hasattr(type(model), "save_pretrained") and "save_pretrained" not in vars(model):
            model.save_pretrained = SavePretrained(model)

    def off(self) -> None:
        model = self.model()
        if model is not None and isinstance(vars(model).get("save_pretrained"), SavePretrained):
            del model.save_pretrained

    def __deepcopy__(self, memo: dict[int, Any]) -> Guard:
        return Guard(memo.get(id(self.model())))

    def __reduce__(self) -> Any:
        return Guard, (None,)  # the model's own `save_pretrained` travels with it


def _patched(model: Any) -> bool:
    try:
        return acting(model) is not None
    except UnsupportedModel:  # its tower was taken out
        return False
