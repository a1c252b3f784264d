"""What to say of a model that no row describes: the row that would, guessed from names, shapes and one trial."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedModel
from .families import Family
from .paths import reach

CLASS_TOKENS = ("cls_token", "class_token", "class_embedding", "cls_embed", "dist_token", "distillation_token")
REGISTERS = ("register_tokens", "registers", "storage_tokens", "reg_token", "reg_tokens", "register_token")
WHOLE = ("patch_generator.num_skip", "num_prefix_tokens", "config.num_summary_tokens")  # all tokens before the patches
NATIVE = ("num_register_tokens", "n_storage_tokens", "num_reg_tokens", "num_registers")  # of them, native registers
SEEDS = ("ln_pre", "norm_pre", "pre_layrnorm", "pre_layernorm", "pre_norm", "ln_post_embed")
ELSEWHERE = ("head", "pool", "decoder", "predictor", "text")  # where a class token is not one of the blocks
NAME = "my-vit"


def unknown(model: nn.Module, known: str, resolve: Callable[[nn.Module, Family], Any]) -> str:
    """What to tell the user of a `model` of no known family.

    Args:
        known: the families, in words.
        resolve: the tower that a row describes; raises UnsupportedModel where it does not fit.
    """
    name = type(model).__name__
    if getattr(model, "main_input_name", "") == "input_ids" and "image" not in getattr(model, "input_modalities", ()):
        return (
            f"{name} is a text model, and images are for Vision Transformers. A causal language model is looked at "
            f"with text: testreg.find(model, text=...) (--text FILE instead of --images)."
        )
    told = f"{name} is of no known family ({known})."
    found = guess(model)
    if found is None:
        return (
            f"{told} Nothing in it looks like the blocks of a Vision Transformer: modules of one class, with attention."
        )
    module, row = found
    try:
        row, how = tried(resolve(module, row))
    except UnsupportedModel as error:
        return f"{told} It looks as if its blocks were at {row.blocks} of {type(module).__name__}, but: {error}"
    return (
        f"{told} If it is a Vision Transformer, describe it first, with the paths and number of prefix tokens checked "
        f"({how}); on the command line by --family '{written(row)}', in Python by\n"
        f"    testreg.FAMILIES[{NAME!r}] = testreg.Family(\n        {written(row)})"
    ).replace(repr(NAME), f'"{NAME}"')


def width(block: nn.Module, attention: nn.Module) -> int | None:
    """Channels of the residual stream, by the norms of a block outside its attention; None where it has none."""
    inside = set(map(id, attention.modules()))
    sizes = [
        int(weight.numel())
        for part in block.modules()
        if "norm" in type(part).__name__.lower() and id(part) not in inside
        for weight in [getattr(part, "weight", None)]
        if isinstance(weight, Tensor)
    ]
    counts = Counter(sizes)
    return min(counts, key=lambda size: (-counts[size], size)) if counts else None


def class_tokens(tower: nn.Module, names: Collection[str] = CLASS_TOKENS) -> Iterator[tuple[str, Tensor]]:
    """Parameters of `tower` whose `names` say that they stand in front of its patches."""
    for name, parameter in tower.named_parameters():
        *above, last = name.split(".")
        if last in names and not any(part in place for part in ELSEWHERE for place in above):
            yield name, parameter


def guess(model: nn.Module) -> tuple[nn.Module, Family] | None:
    """The module that looks like a vision tower, and the row that would describe it, as far as names can tell."""
    best = max(_lists(model), key=lambda found: (-found[0], len(found[3])), default=None)
    if best is None:
        return None
    _, tower, path, blocks = best
    block = _one(blocks)
    parts = dict(block.named_modules())
    attention = _attention(parts)
    module: Any = parts[attention]
    stream = width(block, module) or _last(module.named_modules(), None)[1]
    down, _ = _last(parts.items(), stream, f"{attention}.")
    signature = inspect.signature(type(module).forward).parameters
    arguments = list(signature)[1:]
    prefix, prefix_from = _prefix(tower, stream)
    segments = next((name for name in arguments if "cu_seq" in name), None)
    return tower, Family(
        type(tower).__name__,
        path,
        down,
        attention,
        prefix=prefix,
        prefix_from=prefix_from,
        seed=next((name for name in SEEDS if isinstance(getattr(tower, name, None), nn.Module)), None),
        masks=tuple(name for name in arguments[1:] if "mask" in name.lower() or "bias" in name.lower()) or Family.masks,
        rope=next((name for name in arguments if name in ("rope", "position_embeddings", "freqs", "rotary")), None),
        turn=next((name for name in ("rope", "rotary_emb") if callable(getattr(module, name, None))), None),
        positions=next((name for name in arguments if name in ("position_ids", "position_mask", "positions")), None),
        packed=segments is not None and signature[segments].default is inspect.Parameter.empty,
        segments=segments,
        package=type(tower).__module__.split(".")[0],
    )


def written(row: Family) -> str:
    """The row as its user would write it: the first four by place, and what differs from the defaults by name."""
    first = ", ".join(_quoted(getattr(row, name)) for name in ("towers", "blocks", "down", "attention"))
    defaults = Family("", "")
    more = [
        f"{field.name}={_quoted(getattr(row, field.name))}"
        for field in fields(row)[4:]
        if field.name in ("prefix", "package") or getattr(row, field.name) != getattr(defaults, field.name)
    ]
    return ", ".join([first, *more])


def tried(tower: Any) -> tuple[Family, str]:
    """The row after its first block ran alone on random tokens of three images, and what that showed.

    Raises:
        UnsupportedModel: the block ran without calling its attention, or the linear that should be the MLP's second.
    """
    block, row = tower.blocks[0], tower.row
    weight = next(block.parameters(), None)
    if weight is None or weight.is_meta or row.packed:
        return row, "not tried: its blocks cannot run alone"
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 5, tower.channels, generator=generator).to(weight)
    called: set[str] = set()
    parts = {"attention": tower.attentions[0], "second linear": tower.downs[0]}
    handles = [
        part.register_forward_pre_hook(lambda module, args, name=name: called.add(name)) for name, part in parts.items()
    ]
    try:
        with _still(block):
            before, after = (_first(block(given)) for given in (tokens, _other(tokens)))
    except Exception as error:  # whatever a block raises that wants more than tokens
        return row, f"not tried: its blocks cannot run alone, {type(error).__name__}"
    finally:
        for handle in handles:
            handle.remove()
    for name in parts:
        if name not in called:
            raise UnsupportedModel(
                f"its first block runs without calling its {name} ({type(parts[name]).__name__}) as a module, so what "
                f"is put there would do nothing."
            )
    if isinstance(before, Tensor) and before.shape == tokens.shape and not torch.allclose(before[1:], after[1:]):
        return replace(row, sequence_first=True), "tried on its first block, which takes (tokens, batch, channels)"
    return row, "tried on its first block"


def _lists(model: nn.Module) -> Iterator[tuple[int, nn.Module, str, Any]]:
    """Lists that look like blocks: how far the tower that embeds their patches is above, that tower, path and list."""
    modules = dict(model.named_modules())
    for path, blocks in modules.items():
        if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or len({type(block) for block in blocks}) != 1:
            continue
        block = _one(blocks)
        if type(block).forward is nn.Module.forward or not _attention(dict(block.named_modules())):
            continue
        names = path.split(".")
        for up in range(1, len(names) + 1):
            tower = modules[".".join(names[:-up])]
            if any(isinstance(part, (nn.Conv2d, nn.Conv3d)) or "embed" in name for name, part in tower.named_modules()):
                yield up, tower, ".".join(names[-up:]), blocks
                break


def _one(blocks: Any) -> nn.Module:
    """The first block of a list, or of the first chunk in it."""
    first: nn.Module = blocks[0]
    if isinstance(first, nn.ModuleList) and type(first).forward is not nn.Module.forward:
        return next((part for part in first if not isinstance(part, nn.Identity)), first)
    return first


def _attention(parts: dict[str, Any]) -> str:
    """The path of the part whose name says that it attends, or whose class does; of one in another, the inner one."""
    named = [name for name in parts if "att" in name.split(".")[-1].lower() and not _aside(name)]
    known = [name for name, part in parts.items() if name and "attention" in type(part).__name__.lower()]
    first = next(iter(named or known), "")
    return f"{first}.attention" if isinstance(parts.get(f"{first}.attention"), nn.Module) else first


def _aside(name: str) -> bool:
    """Whether a part's name says that it is beside an attention, its norm or dropout."""
    return any(word in name.split(".")[-1].lower() for word in ("norm", "drop", "ln_", "scale"))


def _last(parts: Any, size: int | None, not_in: str = "\0") -> tuple[str, int]:
    """The last linear that gives `size` channels, or any number, and how many it gives."""
    found = [
        (name, int(part.out_features))
        for name, part in parts
        if isinstance(part, nn.Linear) and not name.startswith(not_in) and size in (None, part.out_features)
    ]
    return found[-1] if found else ("mlp.fc2", size or 0)


def _prefix(tower: nn.Module, stream: int) -> tuple[int, str | None]:
    """How many class tokens `tower` has, and which of its attributes says how many tokens stand with them."""
    whole = next((path for path in WHOLE if isinstance(reach(tower, path), int)), None)
    if whole:
        return 0, whole
    count = sum(parameter.numel() // max(1, stream) for _, parameter in class_tokens(tower))
    paths = [path for name in NATIVE for path in (name, f"config.{name}")]
    told = next((path for path in paths if isinstance(reach(tower, path), int)), None)
    if told is None:
        count += sum(parameter.numel() // max(1, stream) for _, parameter in class_tokens(tower, REGISTERS))
    return count, told


def _quoted(value: Any) -> str:
    """A value as Python, with double quotes."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_quoted, value))}{',' * (len(value) == 1)})"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _other(tokens: Tensor) -> Tensor:
    """The same tokens but for those of the first image."""
    return torch.cat([-tokens[:1], tokens[1:]])


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output


@contextmanager
def _still(block: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside the `with`."""
    modes = [(module, module.training) for module in block.modules()]
    block.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
