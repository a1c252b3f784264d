"""Loads a checkpoint with registers: the class that was saved, from stock transformers, with its patch on.

This file is part of every checkpoint, with the modules that it imports: `AutoModel.from_pretrained(path,
trust_remote_code=True)` runs it where testreg is not installed; where it is, `import testreg` registers the same names.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers.configuration_utils import PreTrainedConfig

from .errors import BadCheckpoint, TestregError
from .guard import SavePretrained
from .installer import Patch
from .packed import join as _join  # noqa: F401, transformers copies the files that are imported in this form
from .plan import RegisterPlan
from .recipe import MODEL_TYPE, PLAN, Recipe
from .redirect import move as _move  # noqa: F401, as above

# Weights of transformers and of testreg, not those that a repository holds for other libraries; no code, no pickle.
FILES = ["*.json", "model*.safetensors", PLAN, "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*"]
HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def load(path: str | Path, **kwargs: Any) -> Any:
    """The patched model of a checkpoint that `testreg.save` wrote, in evaluation mode.

    Args:
        path: its directory, or its name on the hub.
        kwargs: what `from_pretrained` of the model's class takes: `dtype`, `device_map`, `config`, `revision`, ...

    Returns:
        A model of the class that was saved. `testreg.active(model)` is its patch.

    Raises:
        BadCheckpoint: there is no such checkpoint, it is damaged, or its files are not those that were saved.
        BadPlan: its plan is damaged or does not fit the model.
    """
    directory = fetch(path, kwargs)
    kwargs.pop("trust_remote_code", None)  # nothing that lies in the directory is run
    recipe = Recipe.read(directory)
    dtype: dict[str, Any] = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
    _check_dtype(*dtype.values())
    given = kwargs.pop("config", None)
    config, unused = _base_config(recipe, kwargs)
    config = config if given is None else _config_of(given, config)
    return _load(directory, recipe, config, class_of(recipe.architecture, config), **unused, **dtype)


def fetch(path: str | Path, kwargs: dict[str, Any], more: Iterable[str] = ()) -> Path:
    """The directory that `path`, a directory or a name on the hub, stands for; takes the hub's settings from `kwargs`.

    Args:
        more: patterns of files that are wanted beside `FILES`.

    Raises:
        BadCheckpoint: there is neither.
    """
    hub = {name: kwargs.pop(name) for name in HUB if name in kwargs}
    subfolder = kwargs.pop("subfolder", "") or ""
    directory = Path(path).expanduser()
    if directory.is_file():
        raise BadCheckpoint(f"{path} is a file; a checkpoint is a directory with a config.json.")
    if not directory.is_dir():
        name = str(path)
        if directory.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise BadCheckpoint(f"there is no directory {path}. Give one with a config.json, or a name on the hub.")
        try:
            directory = Path(snapshot_download(name, allow_patterns=[*FILES, *more], **hub))
        except Exception as error:  # of the hub's client: offline, no such name, no access, a full disk
            why = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise BadCheckpoint(
                f"{name} is no directory here, and cannot be had from the hub: {first_line(why)}. Give one with a "
                f"config.json, or try again online."
            ) from error
    return directory / subfolder


def _base_config(recipe: Recipe, kwargs: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The config of the unpatched model, with those of `kwargs` that are settings of it, and the other `kwargs`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = recipe.base_config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise BadCheckpoint(
            f"the checkpoint holds a model of type {model_type!r}, which transformers {transformers.__version__} does "
            f"not know: pip install -U transformers."
        )
    try:
        config_class: Any = CONFIG_MAPPING[model_type]
        config, unused = config_class.from_dict({**recipe.base_config}, **{**kwargs, "return_unused_kwargs": True})
        attention = kwargs.get("attn_implementation") or recipe.attention
        if attention:
            config._attn_implementation = attention  # of its sub-configs too
        return config, unused
    except Exception as error:  # the values are a stranger's, and each config class checks them in its own way
        raise BadCheckpoint(f"the checkpoint's config is damaged: {first_line(error)}") from error


def _check_dtype(*wanted: Any) -> None:
    for dtype in wanted:
        known = dtype in (None, "auto") or isinstance(dtype, (torch.dtype, dict))
        if not known and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise BadCheckpoint(f"dtype must be a dtype of torch, its name, or 'auto', not {dtype!r:.50}.")


def _config_of(given: Any, own: PreTrainedConfig) -> PreTrainedConfig:
    """The config to load with instead of the checkpoint's own, as `from_pretrained` takes one."""
    given = given.base_config if isinstance(given, TestregConfig) else given
    if type(given) is not type(own):
        raise BadCheckpoint(
            f"config must be a {type(own).__name__}, as the checkpoint's own is, not {type(given).__name__}: take "
            f"AutoConfig.from_pretrained(PATH, trust_remote_code=True), change it, and hand it on."
        )
    return deepcopy(given)


def class_of(name: str, config: PreTrainedConfig) -> Any:
    """The model class of transformers called `name`, from the package or from the file that goes with `config`.

    Raises:
        BadCheckpoint: there is none.
    """
    found = getattr(transformers, name, None)
    if found is None and type(config).__module__.startswith("transformers.models."):
        found = getattr(import_module(type(config).__module__.replace(".configuration_", ".modeling_")), name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise BadCheckpoint(
            f"the checkpoint holds a {name}, which is no model class of transformers {transformers.__version__}."
        )
    return found


def _load(directory: Path, recipe: Recipe, config: PreTrainedConfig, model_class: Any, **kwargs: Any) -> Any:
    if model_class.config_class is not type(config):
        raise BadCheckpoint(
            f"the checkpoint's {model_class.__name__} and its {type(config).__name__} do not belong together."
        )
    stored = recipe.verify(directory)
    plan = RegisterPlan.load(directory / PLAN)
    config.transformers_weights = recipe.weights
    as_saved = model_class.__name__ == recipe.architecture
    init = takes(model_class, recipe.init)
    wants_info = kwargs.pop("output_loading_info", False)
    dtypes = {name: getattr(torch, dtype) for name, dtype in recipe.dtypes.items()}
    mixed = bool(dtypes) and kwargs.get("dtype", kwargs.get("torch_dtype")) in (None, "auto")
    if mixed:  # `from_pretrained` gives all weights one: the widest holds every number exactly
        kwargs["dtype"] = reduce(torch.promote_types, dtypes.values())
    kwargs = {**init, **kwargs, "config": config, "use_safetensors": True, "output_loading_info": True}
    try:
        wanted = sum(weight.numel() for weight in skeleton(model_class, config, **init).state_dict().values())
        if wanted > 2 * stored + 2**20:
            raise BadCheckpoint(
                f"{directory} describes a model of {wanted:,} weights, but holds {stored:,}: its config is that of "
                f"another model."
            )
        model, info = model_class.from_pretrained(str(directory), **kwargs)
    except (TestregError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a stranger's config and weights can fail anywhere in the class that reads them
        raise BadCheckpoint(f"{directory} cannot be loaded as {model_class.__name__}: {first_line(error)}") from error
    for name, verb in (
        ("missing_keys", "lacks weights of"),
        ("unexpected_keys", "holds weights without a place in"),
    ):
        if as_saved and (keys := sorted(map(str, info[name]))):
            raise BadCheckpoint(f"{directory} {verb} {model_class.__name__}: {', '.join(keys[:3])}.")
    del model.config.transformers_weights
    for name, weight in [*model.named_parameters(), *model.named_buffers()] if mixed and as_saved else []:
        weight.data = weight.data.to(dtypes.get(name, weight.dtype))
    Patch(model, plan)  # the recipe has vouched for the weights
    model.save_pretrained = SavePretrained(model, loaded=True)
    return (model, info) if wants_info else model


def takes(model_class: Any, init: Mapping[str, bool]) -> dict[str, bool]:
    """What of `init` a class is built with: all of it, or nothing."""
    return dict(init) if set(init) <= set(inspect.signature(model_class).parameters) else {}


def skeleton(model_class: Any, config: PreTrainedConfig, **init: Any) -> Any:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return model_class(config, **init)


def first_line(error: Exception) -> str:
    """What went wrong, in one line and without a full stop: it is said inside of a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('. ')}" if lines else type(error).__name__


class TestregConfig(PreTrainedConfig):
    """What `AutoConfig` gives for a checkpoint with registers: the unpatched model's config, and the recipe."""

    __test__ = False  # or pytest takes the name for a test class
    model_type = MODEL_TYPE

    def __init__(self, base_config: Any = None, testreg: Any = None, **kwargs: Any):
        if isinstance(base_config, PreTrainedConfig):  # whoever reads configs wants the model's labels and sizes
            kwargs |= {"id2label": base_config.id2label, "label2id": base_config.label2id}
        super().__init__(**kwargs)
        self.base_config, self.testreg = base_config, testreg

    def __getattr__(self, name: str) -> Any:
        base = self.__dict__.get("base_config")
        if name.startswith("_") or not isinstance(base, PreTrainedConfig):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(base, name)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        recipe = Recipe.from_config(config_dict)
        unused_too = kwargs.pop("return_unused_kwargs", False)
        base_config, unused = _base_config(recipe, kwargs)
        config = cls(**{**config_dict, "base_config": base_config})
        config.name_or_path = kwargs.get("name_or_path", "")
        register(cls)
        return (config, unused) if unused_too else config


class _Loader:
    """Stands for a model class where an Auto class looks for one; gives a stock class's model with its patch on."""

    config_class = TestregConfig
    auto = "AutoModel"

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: the checkpoint's files travel with `testreg.save`."""

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        raise TestregError("registers without the weights that they were found in mean nothing: use from_pretrained.")

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("trust_remote_code", None), kwargs.pop("adapter_kwargs", None)
        if config is None:
            config, kwargs = cls.config_class.from_pretrained(path, return_unused_kwargs=True, **kwargs)
        directory = fetch(path, kwargs)
        recipe, mapping = Recipe.read(directory), _auto_classes()[cls.auto]._model_mapping
        if type(config.base_config) not in mapping:
            raise BadCheckpoint(
                f"{path} holds a {recipe.architecture}, which {cls.auto} does not load; testreg.load does."
            )
        classes = mapping[type(config.base_config)]
        classes = classes if isinstance(classes, (list, tuple)) else (classes,)
        model_class = next((found for found in classes if found.__name__ == recipe.architecture), classes[0])
        return _load(directory, recipe, config.base_config, model_class, **kwargs)


def _auto_classes() -> dict[str, Any]:
    from transformers.models.auto import modeling_auto

    return {
        name: found
        for name, found in vars(modeling_auto).items()
        if name.startswith("Auto") and getattr(found, "_model_mapping", None) is not None
    }


def auto_map(config: PreTrainedConfig) -> dict[str, str]:
    """Which class of this file each Auto class loads for a model with `config`, as `config.json` says it."""
    module = "modeling_testreg"
    autos = [name for name, auto in _auto_classes().items() if type(config) in auto._model_mapping]
    return {"AutoConfig": f"{module}.TestregConfig", **{name: f"{module}.Testreg{name}" for name in autos}}


def register(config_class: Any) -> None:
    """Make every Auto class load checkpoints with registers."""
    for name, auto in _auto_classes().items():
        if config_class not in auto._model_mapping:
            auto.register(config_class, getattr(sys.modules[__name__], f"Testreg{name}"), exist_ok=True)


def __getattr__(name: str) -> Any:
    auto = name.removeprefix("Testreg")
    if name == auto or auto not in _auto_classes():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    loader = type(name, (_Loader,), {"auto": auto, "__doc__": _Loader.__doc__})
    globals()[name] = loader
    return loader
