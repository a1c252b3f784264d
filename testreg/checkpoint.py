"""Saving a patched model, and loading an unpatched one with care. `load` is in `modeling_testreg`."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any, TypeGuard

import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from . import base
from .atomic import replacing
from .card import card
from .errors import BadCheckpoint, TestregError, UnsupportedModel
from .families import find_tower
from .modeling_testreg import auto_map, class_of, fetch, first_line, load, skeleton
from .patch import active
from .recipe import MODEL_TYPE, NOT_WITHOUT_REGISTERS, PLAN, Recipe, config_sha256, read_json, sha256

__all__ = ["is_patched", "load", "load_base", "save"]

WEIGHTS = "model.testreg"  # how the weights' file names begin, so that no stock class finds them
INDEX = f"{WEIGHTS}.safetensors.index.json"
TIMM = "timm_wrapper"  # the model type of timm's models in transformers
CODE = ("errors", "families", "plan", "redirect", "guard", "forwards", "patch", "recipe", "modeling_testreg")
# The image processor and the tokenizer of the unpatched checkpoint, and its licence.
PROCESSOR = re.compile(
    r"(pre|video_pre)?processor_config\.json|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|"
    r"vocab\.(json|txt)|merges\.txt|[\w.-]+\.(model|jinja)|chat_template\.json|LICENSE(\.\w+)?"
)
# What else may lie in a directory that is replaced.
CHECKPOINT = re.compile(
    rf"(generation_)?config\.json|[\w.-]+\.safetensors(\.index\.json)?|pytorch_model[\w.-]*\.bin(\.index\.json)?|"
    rf"README\.md|\.gitattributes|({'|'.join(CODE)})\.py"
)


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    force: bool = False,
    max_shard_size: int | str = "5GB",
    push_to_hub: str | None = None,
) -> Path:
    """Write a patched model as a checkpoint that never loads as the unpatched one.

    The weights are the unpatched model's, with its config, image processor and tokenizer, the plan, a model card, and
    the code that loads all of it where testreg is not installed. Killed at any moment, `directory` holds what it held
    before or the whole new checkpoint.

    Args:
        model: a model of transformers on which a patch acts.
        directory: where to; made with its parents. Must be empty or not exist.
        force: replace the checkpoint that `directory` holds.
        max_shard_size: the size from which weights are split into several files.
        push_to_hub: a hub name, `"me/vit-clean"`, to upload the directory to as well.

    Returns:
        The directory.

    Raises:
        TestregError: the model is not patched.
        UnsupportedModel: its class is not one of transformers, or it is quantised.
        BadCheckpoint: the directory is in use or cannot be written; nothing is changed.
    """
    acting = active(model)
    if acting is None:
        raise TestregError(
            f"{type(model).__name__} is not patched, so there are no registers to save: testreg.patch(model, found) "
            f"first, and save inside the `with` if there is one."
        )
    if not _comes_back(model):
        raise UnsupportedModel(
            f"{type(model).__name__} is not of transformers itself, so its checkpoint could not be loaded again. Keep "
            f"the plan, found.save(FILE), and {_instead(model)}"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} is quantised: patch and save the unquantised model, or keep the plan with "
            f"found.save(FILE)."
        )
    target = free(directory, model, force)
    source = source_files(model)
    try:
        with replacing(target) as build:
            type(model).save_pretrained(model, build, variant="testreg", max_shard_size=max_shard_size)
            index = build / "model.safetensors.index.testreg.json"
            if index.exists():
                index.rename(build / INDEX)
            weights = sorted(path.name for path in build.iterdir() if path.name.startswith(WEIGHTS))
            acting.plan.save(build / PLAN)
            for name, path in source.items():
                if PROCESSOR.fullmatch(name):
                    copyfile(path, build / name)
            for name in CODE:
                copyfile(Path(__file__).parent / f"{name}.py", build / f"{name}.py")
            base_config = _without(read_json(build / "config.json"), "auto_map")
            recipe = Recipe(
                architecture=type(model).__name__,
                weights=INDEX if INDEX in weights else weights[0],
                files={name: sha256(build / name) for name in [*weights, PLAN]},
                base_config=base_config,
                config=config_sha256(base_config),
                base=base.describe(model),
                init=_init(model),
                attention=_attention(model),
                versions={name: _version(name) for name in ("testreg", "torch", "transformers")},
            )
            config = {**recipe.to_config(), "auto_map": auto_map(model.config), **_for_timm(base_config)}
            (build / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            card(acting.plan, recipe.architecture, base.name(model), source.get("README.md")).save(build / "README.md")
    except (OSError, SafetensorError) as error:
        raise BadCheckpoint(f"{directory} could not be written: {error}. What it held before is untouched.") from error
    if push_to_hub:
        try:
            HfApi().create_repo(push_to_hub, exist_ok=True)
            HfApi().upload_folder(repo_id=push_to_hub, folder_path=target)
        except Exception as error:  # of the hub's client: offline, no access, no such user
            raise BadCheckpoint(
                f"{directory} is saved, but could not be uploaded as {push_to_hub}: {first_line(error)}. Try again: "
                f"`hf upload {push_to_hub} {directory}`."
            ) from error
    return target


def load_base(path: str | Path, *, check: Callable[[Any], Any] = find_tower, **kwargs: Any) -> Any:
    """An unpatched checkpoint as the class that its config names, in evaluation mode, or an error that says why not.

    Args:
        path: its directory, or its name on the hub.
        check: raises where the model is none of those wanted.
        kwargs: what `from_pretrained` takes.

    Raises:
        BadCheckpoint: there is no such checkpoint, it is damaged, lacks weights, or holds NaN.
        UnsupportedModel: by default, it holds no Vision Transformer of a known family.
    """
    directory = fetch(path, kwargs)
    read_json(directory / "config.json")
    if not any(directory.glob("*.safetensors")):
        raise BadCheckpoint(f"{path} has no weights in safetensors, and pickled ones are never read.")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except TestregError:
        raise
    except Exception as error:  # a damaged file, an unknown type: transformers raises anything
        raise BadCheckpoint(f"{path} is no checkpoint that transformers can read: {first_line(error)}") from error
    if config.model_type == MODEL_TYPE:
        raise BadCheckpoint(f"{path} has registers already; testreg.load loads it. Give the original checkpoint.")
    if config.model_type == TIMM:
        kwargs |= _as_transformers_reads_it(config)
    named = next(iter(config.architectures or ()), "")
    found = getattr(transformers, named, None)
    model_class: Any = found if isinstance(found, type) and issubclass(found, PreTrainedModel) else AutoModel
    try:
        if model_class is not AutoModel:
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


def _as_transformers_reads_it(config: Any) -> dict[str, Any]:
    """Name the class of a checkpoint that timm wrote, in its config, and say once how many classes its head has.

    timm names no class. Since 1.0.31 it counts classes among the model's arguments too, and TimmWrapper stops there.

    Returns:
        What `from_pretrained` has to be told.
    """
    config.architectures = config.architectures or [
        "TimmWrapperForImageClassification" if config.num_labels else "TimmWrapperModel"
    ]
    config.model_args = _without(config.model_args or {}, "num_classes")
    return {"model_args": config.model_args}


def is_patched(path: str | Path) -> bool:
    """Whether a directory, or a name on the hub, holds a checkpoint with registers."""
    directory = Path(path).expanduser()
    if not directory.exists() and str(path).count("/") < 2:
        try:
            directory = Path(hf_hub_download(str(path), "config.json")).parent
        except Exception:  # of the hub's client; whoever loads it says what is wrong
            return False
    return _config(directory).get("model_type") == MODEL_TYPE


def _config(directory: Path) -> dict[str, Any]:
    try:
        values = read_json(directory / "config.json")
    except BadCheckpoint:
        return {}
    return values if isinstance(values, dict) else {}


def _comes_back(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether loading would find the model's class."""
    try:
        return isinstance(model, PreTrainedModel) and class_of(type(model).__name__, model.config) is type(model)
    except BadCheckpoint:
        return False


def _instead(model: nn.Module) -> str:
    """How a model that is none of transformers' keeps its registers all the same."""
    if hasattr(model, "pretrained_cfg"):  # timm's, which transformers loads
        return (
            "patch the model as transformers loads it: timm.models.save_for_hf(model, DIR, safe_serialization=True) "
            "writes it down, and `testreg patch DIR --images PHOTOS --plan FILE --out OUT` patches what lies there."
        )
    return "apply it when you need it: testreg.patch(model, testreg.RegisterPlan.load(FILE))."


def free(directory: str | Path, model: nn.Module, replace: bool, how: str = "force=True (--force)") -> Path:
    """The whole path of `directory`, where writing a checkpoint of `model` there loses nothing.

    Args:
        replace: a checkpoint that it holds may go.
        how: the user says so.

    Raises:
        BadCheckpoint: it is the model's own, holds something and `replace` is not given, holds what is no checkpoint,
            or cannot be written.
    """
    target = Path(directory).expanduser().resolve()
    source = str(getattr(model, "name_or_path", "") or "")
    if source and Path(source).is_dir() and Path(source).resolve() == target:
        raise BadCheckpoint(f"{directory} is the checkpoint that the model was loaded from: choose another directory.")
    if target.exists() and not target.is_dir():
        raise BadCheckpoint(f"{directory} is a file; a directory is needed.")
    try:
        place = next(folder for folder in target.parents if folder.exists())
        with TemporaryDirectory(dir=place, prefix=f".{target.name}.testreg-"):
            pass
    except OSError as error:
        raise BadCheckpoint(
            f"{directory} could not be written: {error.strerror} in {place}. Choose another directory."
        ) from error
    if not target.exists():
        return target
    held = sorted(target.iterdir())
    if held and not replace:
        raise BadCheckpoint(f"{directory} exists and is not empty: choose another, or pass {how}.")
    strangers = [path.name for path in held if not path.is_file() or not _belongs(path.name)]
    if strangers or (held and not _config(target).keys() & {"model_type", "architecture"}):
        has = f"{strangers[0]}, which is no part of a checkpoint" if strangers else "no config of a model"
        raise BadCheckpoint(f"{directory} holds {has}: nothing there is replaced. Choose another directory.")
    return target


def _belongs(name: str) -> bool:
    return bool(PROCESSOR.fullmatch(name) or CHECKPOINT.fullmatch(name))


def source_files(model: nn.Module) -> dict[str, Path]:
    """File name -> path, of the small files beside the checkpoint that `model` was loaded from."""
    source = str(getattr(model, "name_or_path", "") or "")
    if not source:
        return {}
    folder = Path(source)
    if not folder.is_dir():
        revision = getattr(getattr(model, "config", None), "_commit_hash", None)
        found = try_to_load_from_cache(source, "config.json", revision=revision) if source.count("/") < 2 else None
        if not isinstance(found, str):
            return {}
        folder = Path(found).parent
    return {path.name: path for path in folder.iterdir() if path.is_file()}


def _init(model: PreTrainedModel) -> dict[str, bool]:
    """A bare tower loaded from these weights, with or without a head around it now, must not make up a pooler."""
    pooler = any(name.split(".")[-1] == "pooler" for name, _ in model.named_modules())
    return {} if pooler else {"add_pooling_layer": False}


def _takes_pooler(model_class: Any) -> bool:
    return "add_pooling_layer" in inspect.signature(model_class).parameters


def _attention(model: PreTrainedModel) -> str | None:
    used = getattr(model.config, "_attn_implementation", None)
    return used if used in ("eager", "sdpa") else None


def _for_timm(base_config: Mapping[str, Any]) -> dict[str, Any]:
    """Where a timm model's preprocessing is looked for, in `config.json`; timm itself stops at the architecture."""
    if base_config["model_type"] != TIMM or "pretrained_cfg" not in base_config:
        return {}
    return {
        "architecture": NOT_WITHOUT_REGISTERS,
        "image_processor_type": "TimmWrapperImageProcessor",
        "pretrained_cfg": base_config["pretrained_cfg"],
    }


def _without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
