"""Where each family of Vision Transformers keeps its parts: one row of data per family.

A model is looked up by package and class name over the bases of every submodule, so no modelling code is ever
imported, and heads, two-tower models and vision-language models that hold a tower need no row of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import UnsupportedModel


@dataclass(frozen=True)
class Family:
    """Paths are dotted attribute names: `blocks` and `seed` start at the tower, `down` and `attention` at a block.

    Where releases or variants of a library name a thing differently, a path may be a tuple of paths: the first one
    that is there counts.

    Args:
        towers: class names of the modules that hold the blocks.
        blocks: the list of blocks; each takes `(batch, tokens, channels)` first and returns it, alone or first in a
            tuple.
        down: the MLP's second linear, whose input is the neuron activation.
        attention: the attention module.
        prefix: tokens in front of the patches (class and distillation token).
        prefix_from: attribute of the tower that holds how many more there are (native registers), if any.
        seed: the norm between embeddings and first block, which a register that joins with the embeddings passes too.
        masks: the attention's arguments that are masks or biases over its tokens.
        package: top-level package of the tower class.
    """

    towers: str | tuple[str, ...]
    blocks: str | tuple[str, ...]
    down: str | tuple[str, ...] = "mlp.fc2"
    attention: str | tuple[str, ...] = ("attention.attention", "attention")
    prefix: int = 1
    prefix_from: str | None = None
    seed: str | None = None
    masks: tuple[str, ...] = ("attention_mask",)
    package: str = "transformers"


FAMILIES: dict[str, Family] = {
    "vit": Family("ViTModel", ("layers", "encoder.layer"), ("mlp.fc2", "output.dense")),
    "deit": Family("DeiTModel", ("layers", "encoder.layer"), ("mlp.fc2", "output.dense"), prefix=2),
    "dinov2": Family(
        ("Dinov2Model", "Dinov2Backbone"), "encoder.layer", ("mlp.fc2", "mlp.down_proj", "mlp.weights_out")
    ),
    "dinov2-with-registers": Family(
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
        "encoder.layer",
        ("mlp.fc2", "mlp.down_proj", "mlp.weights_out"),
        prefix_from="config.num_register_tokens",
    ),
    "clip": Family(
        ("CLIPVisionModel", "CLIPVisionTransformer"), "encoder.layers", attention="self_attn", seed="pre_layrnorm"
    ),
    "siglip": Family(
        ("SiglipVisionModel", "SiglipVisionTransformer"), "encoder.layers", attention="self_attn", prefix=0
    ),
}


@dataclass(frozen=True)
class Tower:
    """A vision tower found inside a model.

    Attributes:
        path: dotted name of the tower in the model, `""` where the model is the tower.
        family: its key in `FAMILIES`.
        prefix: number of tokens in front of the patches, class, distillation and native register tokens together.
        channels: width of the residual stream.
        neurons: number of MLP neurons per block.
    """

    path: str
    family: str
    module: nn.Module
    blocks: tuple[nn.Module, ...]
    downs: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    seed: nn.Module | None
    masks: tuple[str, ...]
    prefix: int
    channels: int
    neurons: tuple[int, ...]


def find_tower(model: nn.Module) -> Tower:
    """The one vision tower of `model`: a tower, a model with a head, a pipeline, a vision-language model.

    Raises:
        UnsupportedModel: no submodule belongs to a known family, or more than one tower does.
    """
    if not isinstance(model, nn.Module):
        inner = getattr(model, "model", None)  # a transformers pipeline
        if not isinstance(inner, nn.Module):
            raise UnsupportedModel(f"a model is needed, a torch.nn.Module, but {type(model).__name__} was given.")
        model = inner
    towers: list[Tower] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{tower.path}.") or not tower.path for tower in towers):
            continue  # inside a tower that is already found
        for name, family in FAMILIES.items():
            if _belongs(module, family):
                towers.append(_resolve(path, module, name, family))
                break
    if not towers:
        raise UnsupportedModel(_unknown(model))
    if len(towers) > 1:
        raise UnsupportedModel(
            f"{type(model).__name__} holds {len(towers)} vision towers ({', '.join(tower.path for tower in towers)}): "
            f"pass one of them, as in testreg.find(model.{towers[0].path}, images)."
        )
    return towers[0]


def reach(module: nn.Module, paths: str | tuple[str, ...]) -> Any:
    """The attribute at a dotted path, or at the first of several that is there; None where there is none."""
    for path in _each(paths):
        found: Any = module
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return found
    return None


def _each(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _belongs(module: nn.Module, family: Family) -> bool:
    classes = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.split(".")[0] == family.package}
    return not classes.isdisjoint(_each(family.towers)) and isinstance(
        reach(module, family.blocks), (nn.ModuleList, nn.Sequential)
    )


def _resolve(path: str, module: nn.Module, name: str, family: Family) -> Tower:
    blocks = tuple(reach(module, family.blocks))
    downs, attentions = [], []
    for index, block in enumerate(blocks):
        down, attention = reach(block, family.down), reach(block, family.attention)
        if down is None or attention is None:
            missing = " or ".join(_each(family.down if down is None else family.attention))
            raise UnsupportedModel(
                f"{type(module).__name__} is of the family {name!r}, but its block {index} ({type(block).__name__}) "
                f"has no {missing}: it is built in another way than its family, and cannot be patched."
            )
        downs.append(down)
        attentions.append(attention)
    return Tower(
        path=path,
        family=name,
        module=module,
        blocks=blocks,
        downs=tuple(downs),
        attentions=tuple(attentions),
        seed=reach(module, family.seed) if family.seed else None,
        masks=family.masks,
        prefix=family.prefix + (int(reach(module, family.prefix_from)) if family.prefix_from else 0),
        channels=int(downs[0].out_features),
        neurons=tuple(int(down.in_features) for down in downs),
    )


def _unknown(model: nn.Module) -> str:
    name, package = type(model).__name__, type(model).__module__.split(".")[0]
    if getattr(model, "main_input_name", "") == "input_ids":
        return f"{name} is a text model; testreg patches Vision Transformers ({', '.join(FAMILIES)})."
    return (
        f"{name} is of no known family ({', '.join(FAMILIES)}). If it is a Vision Transformer whose blocks take "
        f"(batch, tokens, channels), describe it first, with the paths and number of prefix tokens checked:\n"
        f'    testreg.FAMILIES["my-vit"] = testreg.Family(\n'
        f"        {_guess(model)}, package={package!r})"
    )


def _guess(model: nn.Module) -> str:
    """The row that would describe `model`, as far as names can tell."""
    lists = (
        (path, module) for path, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))
    )
    path, blocks = max(
        ((path, blocks) for path, blocks in lists if len({type(block) for block in blocks}) == 1),
        key=lambda item: len(item[1]),
        default=("encoder.layers", []),
    )
    parts = dict(blocks[0].named_modules()) if len(blocks) else {}
    attention = next((name for name in parts if "att" in name.lower()), "attention")
    linears = [
        name for name, part in parts.items() if isinstance(part, nn.Linear) and not name.startswith(f"{attention}.")
    ]
    tokens = ("cls", "class", "dist")
    prefix = sum(any(part in name.lower() for part in tokens) for name, _ in model.named_parameters() if "tok" in name)
    down = linears[-1] if linears else "mlp.fc2"
    return f'"{type(model).__name__}", "{path}", "{down}", "{attention}", prefix={prefix}'
