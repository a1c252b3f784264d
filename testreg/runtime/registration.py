"""`AutoModel.from_pretrained` and its like load checkpoints with registers once testreg is imported.

Transformers takes a second to import, so it is not imported for this: the config class is registered when transformers'
own list of config classes is there, now or later; it registers the rest when a first such checkpoint is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

CONFIGS = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Register with transformers, as soon as its list of config classes is imported."""
    if CONFIGS in sys.modules:
        _register(sys.modules[CONFIGS])
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register(configs: ModuleType) -> None:
    from .modeling_testreg import TestregConfig

    configs.AutoConfig.register(TestregConfig.model_type, TestregConfig, exist_ok=True)


class _Watcher(MetaPathFinder):
    """Finds nothing itself; lets the one module that it waits for be loaded as ever, and registers then."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == CONFIGS else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            sys.meta_path.remove(self)
            execute(module)
            _register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
