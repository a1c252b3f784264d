"""The vision tower inside a model: found by the rows of `families`, and checked before anything is done to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import families
from .errors import UnsupportedModel
from .families import REFUSED, Family
from .guess import NAME, class_tokens, unknown, width
from .outside import add as add_brought
from .paths import each, reach

NATIVE = ("register_token", "storage_token", "reg_token")  # in the names of native registers


@dataclass(frozen=True)
class Tower:
    """A vision tower found inside a model.

    Attributes:
        path: dotted name of the tower in the model, `""` where the model is the tower.
        family: its key in `FAMILIES`, and `row` what is there.
        prefix: number of tokens in front of the patches, class, distillation and native register tokens together.
        channels: width of the residual stream.
        neurons: number of MLP neurons per block.
        sequence_first: its blocks take `(tokens, batch, channels)`.
    """

    path: str
    family: str
    row: Family
    module: nn.Module
    blocks: tuple[nn.Module, ...]
    downs: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    seed: nn.Module | None
    prefix: int
    channels: int
    neurons: tuple[int, ...]
    sequence_first: bool = False

    def batched(self, value: Any) -> Tensor:
        """What a block takes or gives, or an attention, or the MLP's neurons, as `(images, tokens, ...)`; a view.

        A tensor alone, first in a tuple, or the only one of a list; of a packed tower, one image.
        """
        tensor: Tensor = value[0] if isinstance(value, (tuple, list)) else value
        return tensor[None] if tensor.ndim == 2 else self.turned(tensor)

    def turned(self, tensor: Tensor) -> Tensor:
        """From the order of axes that blocks have to `(batch, tokens, channels)`, and back; a view."""
        return tensor.transpose(0, 1) if self.sequence_first else tensor


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
    if isinstance(model, nn.DataParallel):
        raise UnsupportedModel(
            "nn.DataParallel copies a model to other devices at every call, its patch not among the copies: use "
            "DistributedDataParallel, or patch model.module on one device."
        )
    towers = _towers(model)
    if not towers and add_brought(families.FAMILIES, Family):
        towers = _towers(model)
    if not towers:
        known = ", ".join(families.FAMILIES)
        raise UnsupportedModel(
            _refused(model) or unknown(model, known, lambda tower, row: resolve("", tower, NAME, row))
        )
    if len(towers) > 1:
        raise UnsupportedModel(
            f"{type(model).__name__} holds {len(towers)} vision towers ({', '.join(tower.path for tower in towers)}): "
            f"pass one of them, as in testreg.find(model.{towers[0].path}, images)."
        )
    return towers[0]


def _towers(model: nn.Module) -> list[Tower]:
    towers: list[Tower] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{tower.path}.") or not tower.path for tower in towers):
            continue  # inside a tower that is already found
        for name, family in families.FAMILIES.items():
            if belongs(module, family):
                towers.append(resolve(path, module, name, family))
                break
    return towers


def belongs(module: nn.Module, family: Family) -> bool:
    """Whether a module is the tower of a family, by its class, or one of its bases, and its blocks."""
    packages = each(family.package)
    classes = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.split(".")[0] in packages}
    return not classes.isdisjoint(each(family.towers)) and isinstance(
        reach(module, family.blocks), (nn.ModuleList, nn.Sequential)
    )


def blocks_of(module: nn.Module, family: Family) -> tuple[nn.Module, ...]:
    """The blocks of a tower one by one, where they may come in chunks: lists that count those before them by modules
    that do nothing.
    """
    blocks: list[nn.Module] = []
    for block in reach(module, family.blocks) or ():
        chunk = isinstance(block, nn.ModuleList) and reach(block, family.attention) is None
        blocks += [part for part in block if not isinstance(part, nn.Identity)] if chunk else [block]
    return tuple(blocks)


def resolve(path: str, module: nn.Module, name: str, family: Family) -> Tower:
    """The tower that a row describes, if `module` is built so.

    Raises:
        UnsupportedModel: it is not.
    """

    def differs(what: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{type(module).__name__} is of the family {name!r}, but {what}: it is built in another way than its "
            f"family, and cannot be patched."
        )

    blocks = blocks_of(module, family)
    if not blocks:
        raise UnsupportedModel(f"{type(module).__name__} has no blocks, so there is nothing to patch.")
    downs, attentions, sizes, channels = [], [], [], 0
    for index, block in enumerate(blocks):
        about = f"its block {index} ({type(block).__name__})"
        down, attention = reach(block, family.down), reach(block, family.attention)
        if down is None or attention is None:
            raise differs(f"{about} has no {' or '.join(each(family.down if down is None else family.attention))}")
        if type(block).forward is nn.Module.forward:
            raise differs(f"{about} is a list that is never called, so nothing can join before it or leave after it")
        stream = width(block, attention)
        neurons, written = _sizes(down, stream)
        if neurons is None or stream not in (None, written):
            given = f"{written or 'no'} channels where its residual stream has {stream}"
            raise differs(f"{about} has {given} after {' or '.join(each(family.down))}, so that is no second linear")
        table = getattr(attention, "relative_position_bias_table", None)
        if isinstance(table, Tensor) and not family.bias:
            raise differs("its attention keeps a position table of fixed size")
        downs.append(down)
        sizes.append(neurons)
        channels = channels or written
        attentions.append(attention)
    first = getattr(attentions[0], "batch_first", None)
    seed = reach(module, family.seed) if family.seed else None
    return Tower(
        path=path,
        family=name,
        row=family,
        module=module,
        blocks=blocks,
        downs=tuple(downs),
        attentions=tuple(attentions),
        seed=None if isinstance(seed, nn.Identity) else seed,
        prefix=_prefix(module, family, differs),
        channels=channels,
        neurons=tuple(sizes),
        sequence_first=family.sequence_first if first is None else not first,
    )


def _sizes(down: nn.Module, stream: int | None) -> tuple[int | None, int]:
    """How many neurons a second linear reads, None where it is none, and how many channels it writes.

    An adapter that says neither has the linear inside that it adapts.
    """
    linears: list[Any] = [part for part in down.modules() if hasattr(part, "in_features")]
    if not hasattr(down, "in_features"):
        linears = [part for part in linears if stream in (None, part.out_features)]
    sizes = ((int(part.in_features), int(part.out_features)) for part in linears)
    return next(sizes, (None, 0)) if hasattr(down, "in_features") else max(sizes, default=(None, 0))


def _prefix(module: nn.Module, family: Family, differs: Any) -> int:
    more = reach(module, family.prefix_from) if family.prefix_from else 0
    if (
        more is None
        and family.prefix
        and not any(native in name for name, _ in module.named_parameters() for native in NATIVE)
    ):
        more = 0  # a release before there were native registers
    if more is None:
        raise differs(f"it has no {' or '.join(each(family.prefix_from or ()))}, which tells its prefix tokens")
    prefix = family.prefix + int(more)
    if not prefix and not family.prefix_from:
        for name, _ in class_tokens(module):
            raise differs(f"it has a {name}, where its family has no class token")
    return prefix


def _refused(model: nn.Module) -> str | None:
    for path, module in model.named_modules():
        for cls in type(module).__mro__:
            reason = REFUSED.get(cls.__name__) or REFUSED.get(cls.__module__.split(".")[0])
            if reason:
                what = type(model).__name__ + (f" (in its {path}, a {cls.__name__})" if path else "")
                return f"{what} cannot have registers: {reason}."
    return None
