"""Loading an unpatched checkpoint, with care."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..runtime.errors import BadCheckpoint, TestregError
from ..runtime.modeling_testreg import fetch, first_line, skeleton
from ..runtime.recipe import MODEL_TYPE, read_json
from ..runtime.towers import find_tower
from . import of_timm
from .hub_files import HubFiles


def load_base(
    path: str | Path, *, check: Callable[[Any], Any] = find_tower, trust_remote_code: bool = False, **kwargs: Any
) -> Any:
    """An unpatched checkpoint as the class that its config names, in evaluation mode, or an error that says why not.

    Args:
        path: its directory, or its name on the hub.
        check: raises where the model is none of those wanted.
        trust_remote_code: run the code that the checkpoint brings, where it brings some.
        kwargs: what `from_pretrained` takes.

    Raises:
        BadCheckpoint: there is no such checkpoint, it is damaged, lacks weights, or holds NaN.
        UnsupportedModel: by default, it holds no Vision Transformer of a known family.
    """
    directory = fetch(path, kwargs, more=("*.py",) if trust_remote_code else ())
    read_json(directory / "config.json")
    brought = config_of(directory).get("auto_map") or {}  # class of transformers -> code in the checkpoint
    if not any(directory.glob("*.safetensors")):
        raise BadCheckpoint(f"{path} has no weights in safetensors, and pickled ones are never read.")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except TestregError:
        raise
    except Exception as error:  # a damaged file, an unknown type: transformers raises anything
        if brought and not trust_remote_code:
            raise BadCheckpoint(
                f"{path} is a model of its own code, which lies in the checkpoint and is not run unasked. Look at it; "
                f"then pass --trust-remote-code, or load the model in Python and pass it to testreg.find."
            ) from error
        raise BadCheckpoint(f"{path} is no checkpoint that transformers can read: {first_line(error)}") from error
    if config.model_type == MODEL_TYPE:
        raise BadCheckpoint(f"{path} has registers already; testreg.load loads it. Give the original checkpoint.")
    if config.model_type == of_timm.TIMM:
        kwargs |= of_timm.as_transformers_reads_it(config)
    named = next(iter(config.architectures or ()), "")
    found = getattr(transformers, named, None)
    model_class: Any = found if isinstance(found, type) and issubclass(found, PreTrainedModel) else AutoModel
    if trust_remote_code and brought:
        known = [name for name in brought if name.startswith("AutoModel") and hasattr(transformers, name)]
        model_class = getattr(transformers, "AutoModel" if "AutoModel" in known or not known else known[0])
        kwargs["trust_remote_code"] = True
    try:
        if issubclass(model_class, PreTrainedModel):
            check(skeleton(model_class, config))  # a text model is refused before its weights are read
        kwargs = {**kwargs, "use_safetensors": True, "output_loading_info": True}
        model, info = model_class.from_pretrained(directory, **kwargs)
        missing = sorted(map(str, info["missing_keys"]))
        if missing and all("pooler" in key for key in missing) and _takes_pooler(type(model)):
            model, info = type(model).from_pretrained(directory, add_pooling_layer=False, **kwargs)
            missing = sorted(map(str, info["missing_keys"]))
    except (TestregError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise BadCheckpoint(f"{path} cannot be loaded as {named or 'a model'}: {first_line(error)}") from error
    check(model)
    if missing:
        raise BadCheckpoint(
            f"{path} lacks {len(missing)} weights of {type(model).__name__} ({', '.join(missing[:3])}), which would be "
            f"random numbers: is it the right checkpoint, and complete?"
        )
    for name, weight in model.state_dict().items():
        if weight.is_floating_point() and weight.device.type != "meta" and not weight.isfinite().all():
            raise BadCheckpoint(f"{path} holds NaN or infinity in {name}: the weights are broken, download them again.")
    if not Path(path).expanduser().is_dir():
        model.name_or_path = model.config.name_or_path = str(path)  # the hub's name, not where its cache lies
        model.config._commit_hash = directory.name
    return model


def is_patched(path: str | Path) -> bool:
    """Whether a directory, or a name on the hub, holds a checkpoint with registers."""
    directory = Path(path).expanduser()
    if not directory.exists() and str(path).count("/") < 2:
        try:
            config = HubFiles(str(path)).get("config.json")
        except TestregError:  # whoever loads it says what is wrong
            return False
        directory = config.parent if config else directory
    return config_of(directory).get("model_type") == MODEL_TYPE


def config_of(directory: Path) -> dict[str, Any]:
    try:
        values = read_json(directory / "config.json")
    except BadCheckpoint:
        return {}
    return values if isinstance(values, dict) else {}


def _takes_pooler(model_class: Any) -> bool:
    return "add_pooling_layer" in inspect.signature(model_class).parameters
