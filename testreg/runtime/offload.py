"""Weights that accelerate keeps on the host or on a disk, as `device_map="auto"` does where devices are too small."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Inside the `with`, the weights of `module` can be read, wherever they are kept; not much is loaded at a time."""
    away = [part for part in module.modules() if any(weight.is_meta for weight in part.parameters(recurse=False))]
    with ExitStack() as stack:
        if away:
            from accelerate.utils import align_module_device  # who put them away is there

            for part in away:
                stack.enter_context(align_module_device(part))
        yield
