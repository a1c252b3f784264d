"""A timm model with more register slots: the same architecture, the same names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import UnsupportedModel
from ...runtime.paths import reach
from ...runtime.towers import Tower

SLOTS = {"timm-vit": "reg_tokens", "timm-eva": "num_reg_tokens"}  # family -> the argument that counts its registers


def check(tower: Tower) -> None:
    """Whether timm can build `tower` with more registers.

    Raises:
        UnsupportedModel: how it was built is not known, its class is a derived one, or its head reads registers too.
    """
    module: Any = tower.module
    if not hasattr(module, "_model_args"):
        raise UnsupportedModel(
            f"how this {type(module).__name__} was built is not known, as it is not of timm.create_model, or of a timm "
            f"before 1.0.31, which does not keep the arguments: pip install -U timm, make it by timm.create_model and "
            f"load its weights there."
        )
    if type(module).__name__ != tower.row.towers:
        raise UnsupportedModel(
            f"{type(module).__name__} is a {tower.row.towers} of its own kind, which may not join registers to its "
            f"tokens, so it has no slots: keep the patch, with testreg.patch(model, testreg.RegisterPlan.load(FILE))."
        )
    pools = getattr(module, "attn_pool", None) is not None and tower.family == "timm-eva"
    if pools or getattr(module, "pool_include_prefix", False):
        raise UnsupportedModel(
            f"the head of this {type(module).__name__} pools all tokens, registers as well, so slots would change its "
            f"answer: keep the patch, with testreg.patch(model, testreg.RegisterPlan.load(FILE))."
        )


def with_slots(model: nn.Module, tower: Tower, registers: Tensor) -> Any:
    """The timm model of `tower` with `registers` `(registers, channels)` behind the prefix tokens that it has."""
    import timm

    module: Any = tower.module
    weights = module.state_dict()
    native = weights.get("reg_token", registers[None, :0])
    weights["reg_token"] = torch.cat([native, registers[None]], dim=1)
    places = weights.get("pos_embed")
    if places is not None and not module.no_embed_class:  # what the slots hold has no position on top
        before, patches = places[:, : tower.prefix], places[:, tower.prefix :]
        weights["pos_embed"] = torch.cat([before, torch.zeros_like(registers)[None], patches], dim=1)
    args = {name: value for name, value in module._model_args.items() if not name.startswith("pretrained")}
    args |= {name: reach(module, name) for name in ("in_chans", "num_classes", "global_pool")}
    args[SLOTS[tower.family]] = weights["reg_token"].shape[1]
    cfg = dict(module.pretrained_cfg)
    wrapped = reach(model, "config.pretrained_cfg")  # of the checkpoint, where transformers loaded it
    if wrapped:
        cfg = {**wrapped, "architecture": cfg["architecture"]}
    built = timm.create_model(cfg["architecture"], pretrained_cfg=cfg, **args)
    built.load_state_dict(weights)
    return built.to(registers.dtype).eval()


def write(built: Any, folder: Path, more: Mapping[str, Any]) -> None:
    """A checkpoint of the timm model `built`, which timm and transformers load, with `more` in its `config.json`."""
    from timm.models import save_for_hf

    save_for_hf(built, str(folder), dict(more), safe_serialization=True)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model_args"].pop("num_classes", None)  # it stands beside them too, and TimmWrapper stops at the second
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
