"""`save_pretrained` writes a patched model without its registers: it says so while the patch is on.

A warning, since those who train a patched model save its weights on the way, and patch what they load again.
"""

from __future__ import annotations

import warnings
from types import MethodType
from typing import Any
from weakref import ref

from torch import nn

from .errors import RegistersLeftOut


class Guard:
    """Stands in for the own `save_pretrained` of a model that has one.

    It holds the model weakly: a patch lies on the tower, and who keeps or copies the tower does not want the rest.
    """

    def __init__(self, model: nn.Module | None):
        self.model: Any = (lambda: None) if model is None else ref(model)

    def on(self) -> None:
        model = self.model()
        if hasattr(type(model), "save_pretrained") and "save_pretrained" not in vars(model):
            model.save_pretrained = MethodType(save_pretrained, model)

    def off(self) -> None:
        model = self.model()
        if model is not None and vars(model).get("save_pretrained") == MethodType(save_pretrained, model):
            del model.save_pretrained

    def __deepcopy__(self, memo: dict[int, Any]) -> Guard:
        return Guard(memo.get(id(self.model())))


def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """The model's own `save_pretrained`, with a word."""
    warnings.warn(
        "save_pretrained writes this model without its registers. testreg.save(model, PATH) keeps them; or patch what "
        "you load again: testreg.patch(loaded, testreg.active(model).plan).",
        RegistersLeftOut,
        stacklevel=2,
    )
    type(self).save_pretrained(self, save_directory, *args, **kwargs)
