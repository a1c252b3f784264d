"""Saving a patched model. What loads it again lies in `runtime`, which travels with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any, TypeGuard

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import SafetensorError
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from .. import runtime
from ..runtime import fingerprint as base
from ..runtime.errors import BadCheckpoint, TestregError, UnsupportedModel
from ..runtime.guard import all_acting
from ..runtime.installer import active
from ..runtime.modeling_testreg import auto_map, class_of, first_line, takes
from ..runtime.recipe import PLAN, Recipe, config_sha256, read_json, sha256
from . import of_timm
from .atomic import replacing
from .card import card
from .original import config_of
from .rebuilt import check_rebuilt

WEIGHTS = "model.testreg"  # how the weights' file names begin, so that no stock class finds them
INDEX = f"{WEIGHTS}.safetensors.index.json"
CODE = sorted(path for path in Path(runtime.__file__).parent.glob("*.py") if path.stem != "__init__")  # what loads it
# The image processor and the tokenizer of the unpatched checkpoint, and its licence.
PROCESSOR = re.compile(
    r"(pre|video_pre)?processor_config\.json|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|"
    r"vocab\.(json|txt)|merges\.txt|[\w.-]+\.(model|jinja)|chat_template\.json|LICENSE(\.\w+)?"
)
# What else may lie in a directory that is replaced.
CHECKPOINT = re.compile(
    rf"(generation_)?config\.json|[\w.-]+\.safetensors(\.index\.json)?|pytorch_model[\w.-]*\.bin(\.index\.json)?|"
    rf"README\.md|\.gitattributes|({'|'.join(path.stem for path in CODE)}|patch)\.py"
)


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    replace: bool = False,
    max_shard_size: int | str = "5GB",
    push_to_hub: str | None = None,
    force: bool = False,
) -> Path:
    """Write a patched model as a checkpoint that never loads as the unpatched one.

    The weights are the unpatched model's, with its config, image processor and tokenizer, the plan, a model card, and
    the code that loads all of it where testreg is not installed. Killed at any moment, `directory` holds what it held
    before or the whole new checkpoint.

    Args:
        model: a model of transformers on which a patch acts.
        directory: where to; made with its parents. Must be empty or not exist.
        replace: overwrite a checkpoint that `directory` holds.
        max_shard_size: the size from which weights are split into several files.
        push_to_hub: a hub name, `"me/vit-clean"`, to upload the directory to as well.
        force: what version 0.1 calls `replace`.

    Returns:
        The directory.

    Raises:
        TestregError: the model is not patched.
        UnsupportedModel: its class is not one of transformers, it is quantised, or its class builds another model from
            its config; the message has the names of what differs.
        BadCheckpoint: the directory is in use or cannot be written; nothing is changed.
    """
    model = _inside(model)
    acting = active(model)
    if acting is None:
        raise TestregError(
            f"{type(model).__name__} is not patched, so there are no registers to save: testreg.patch(model, found) "
            f"first, and save inside the `with` if there is one."
        )
    if len(all_acting(model)) > 1:
        raise UnsupportedModel(
            f"{type(model).__name__} has registers in its vision tower and in its language model, and a checkpoint "
            f"holds one plan: keep both, plan.save(FILE), and patch what you load with them."
        )
    if hasattr(model, "merge_and_unload"):  # peft's
        raise UnsupportedModel(
            f"{type(model).__name__} holds adapters beside its weights: take the patch off, merge them with "
            f"model = adapted.merge_and_unload(), then patch and save that."
        )
    if not _comes_back(model):
        raise UnsupportedModel(
            f"{type(model).__name__} is not of transformers itself, so its checkpoint could not be loaded again. Keep "
            f"the plan, found.save(FILE), and {of_timm.instead(model)}"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} is quantised: patch and save the unquantised model, or keep the plan with "
            f"found.save(FILE)."
        )
    init = _init(model)
    copies = check_rebuilt(model, **takes(type(model), init))
    target = free(directory, model, replace or force)
    source = source_files(model)
    try:
        with replacing(target) as build:
            weights_of = {**model.state_dict(), **copies} if copies else None
            type(model).save_pretrained(
                model, build, variant="testreg", max_shard_size=max_shard_size, state_dict=weights_of
            )
            index = build / "model.safetensors.index.testreg.json"
            if index.exists():
                index.rename(build / INDEX)
            weights = sorted(path.name for path in build.iterdir() if path.name.startswith(WEIGHTS))
            acting.plan.save(build / PLAN)
            for name, path in source.items():
                if PROCESSOR.fullmatch(name):
                    copyfile(path, build / name)
            own: Any = getattr(model, "image_processor", None)
            if hasattr(own, "save_pretrained") and not any("processor_config" in path.name for path in build.iterdir()):
                own.save_pretrained(build)
            own = getattr(model, "tokenizer", None)
            if hasattr(own, "save_pretrained") and not (build / "tokenizer_config.json").exists():
                own.save_pretrained(build)
            for path in CODE:
                copyfile(path, build / path.name)
            base_config = {key: value for key, value in read_json(build / "config.json").items() if key != "auto_map"}
            recipe = Recipe(
                architecture=type(model).__name__,
                weights=INDEX if INDEX in weights else weights[0],
                files={name: sha256(build / name) for name in [*weights, PLAN]},
                base_config=base_config,
                config=config_sha256(base_config),
                base=base.describe(model, acting.plan.neurons, acting.tower),
                init=init,
                attention=_attention(model),
                dtypes=_dtypes(model),
                versions={
                    "testreg": runtime.__version__,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
            )
            config = {**recipe.to_config(), "auto_map": auto_map(model.config), **of_timm.preprocessing(base_config)}
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


def _inside(model: Any) -> nn.Module:
    """The model in wrappers that compute what it computes: torch.compile's, those of several processes."""
    while isinstance(model, (DistributedDataParallel, OptimizedModule)):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    return model


def _comes_back(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether loading would find the model's class."""
    try:
        return isinstance(model, PreTrainedModel) and class_of(type(model).__name__, model.config) is type(model)
    except BadCheckpoint:
        return False


def free(directory: str | Path, model: nn.Module, replace: bool) -> Path:
    """The whole path of `directory`, where writing a checkpoint of `model` there loses nothing.

    Args:
        replace: a checkpoint that it holds may go.

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
        raise BadCheckpoint(f"{directory} exists and is not empty: choose another, or pass replace=True (--replace).")
    strangers = [path.name for path in held if not path.is_file() or not _belongs(path.name)]
    if strangers or (held and not config_of(target).keys() & {"model_type", "architecture"}):
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


def _dtypes(model: PreTrainedModel) -> dict[str, str]:
    """Weight -> its dtype, where they are of several: loading would give them all the same."""
    floating = {name: weight.dtype for name, weight in model.state_dict().items() if weight.is_floating_point()}
    several = len(set(floating.values())) > 1
    return {name: str(dtype).removeprefix("torch.") for name, dtype in floating.items()} if several else {}


def _attention(model: PreTrainedModel) -> str | None:
    used = getattr(model.config, "_attn_implementation", None)
    return used if used in ("eager", "sdpa") else None
