"""What `find` and `inspect` have in common: all images through a model, counted, by however many processes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, TypedDict, TypeVar

from torch import nn

from ..images.streaming import ImageStream, stream
from ..runtime.towers import Tower
from .count import Counted, count, total
from .parallel import share, shared
from .scan import SAMPLE
from .still import quiet

Result = TypeVar("Result")


class Running(TypedDict, total=False):
    """How images run through a model: arguments of `find` and of `inspect`, by name, as type checkers read them.

    Attributes:
        processor: by default the one that lies with the checkpoint that the model was loaded from.
        batch_size: images per forward pass.
        workers: processes that decode images.
        progress: show progress bars.
    """

    processor: Callable[..., Any] | str | None
    batch_size: int
    workers: int
    progress: bool


@dataclass(frozen=True)
class Survey:
    """Images and the model that they run through; the other attributes are those of `Running`."""

    model: nn.Module
    tower: Tower
    images: Any
    processor: Callable[..., Any] | str | None = None
    batch_size: int = 16
    workers: int = 0
    progress: bool = False

    @cached_property
    def batches(self) -> ImageStream:
        """This process's share of the images."""
        return stream(
            self.images,
            self.processor,
            model=self.model,
            batch_size=self.batch_size,
            workers=self.workers,
            share=share(),
        )

    def decide(self, make: Callable[[Counted], Result], *, size: int = SAMPLE) -> Result:
        """What `make` makes of all images, each counted by one process; the first process makes it, and all get it.

        Args:
            size: how many images are kept.

        Raises:
            BadImages: there are none.
        """
        with quiet(self.model):
            return shared(
                lambda: count(self.model, self.tower, self.batches, self.progress, size),
                lambda parts: make(total(parts, self.batches)),
            )


Function = TypeVar("Function", bound=Callable[..., Any])


def spelled_out(function: Function) -> Function:
    """A function that takes `**running: Unpack[Running]`, with these arguments and their defaults in its signature."""
    own, given = inspect.signature(function), inspect.signature(Survey).parameters
    named = [one for one in own.parameters.values() if one.kind is not one.VAR_KEYWORD]
    running = [given[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in Running.__annotations__]
    signature = own.replace(parameters=[*named, *running])

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)  # an unknown name is told as Python does, before any work
        return function(*args, **kwargs)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]
