"""The parts of a block that baking reads and writes, whatever its family calls them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import UnsupportedModel
from ...runtime.paths import reach
from ...runtime.towers import Tower


@dataclass(frozen=True)
class Parts:
    """One block: `x + scale1 * out(attention(norm1(x)))`, then `x + scale2 * down(mlp(norm2(x)))`.

    Attributes:
        gate: the linear that an MLP's activation function reads; `up`: what a gated MLP multiplies the result with.
        between: the norm of the neurons in front of `down`, where there is one (EVA-02's `scale_mlp`).
        scale1, scale2: layer scales `(channels,)`, where there are any.
    """

    norm1: nn.LayerNorm
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    scale1: Tensor | None
    norm2: nn.LayerNorm
    gate: nn.Linear
    up: nn.Linear | None
    between: nn.LayerNorm | None
    down: nn.Linear
    scale2: Tensor | None
    heads: int


NAMES: dict[str, tuple[str, ...]] = {
    "norm1": ("layernorm_before", "norm1", "layer_norm1"),
    "norm2": ("layernorm_after", "norm2", "layer_norm2"),
    "gate": ("mlp.gate_proj", "mlp.fc1_g", "mlp.fc1", "intermediate.dense"),
    "up": ("mlp.up_proj", "mlp.fc1_x"),
    "scale1": ("layer_scale1.lambda1", "ls1.gamma", "gamma_1"),
    "scale2": ("layer_scale2.lambda1", "ls2.gamma", "gamma_2"),
}
ATTENTION: dict[str, tuple[str, ...]] = {
    "query": ("q_proj", "query", "attention.query"),
    "key": ("k_proj", "key", "attention.key"),
    "value": ("v_proj", "value", "attention.value"),
    "out": ("o_proj", "out_proj", "output.dense", "proj"),
}
OPTIONAL = ("up", "between", "scale1", "scale2")

BLOCKS, ATTENTIONS = ("Block", "EvaBlock"), ("Attention", "EvaAttention", "AttentionRope")  # of timm, that are alike


def parts(tower: Tower, index: int) -> Parts:
    """Those of block `index`.

    Raises:
        UnsupportedModel: it is built in another way.
    """
    block: Any = tower.blocks[index]
    found: dict[str, Any] = {part: _first(block, names) for part, names in NAMES.items()}
    # Early releases of 5.x nest the projections once more, and the output projection lies beside them.
    around = [tower.attentions[index], getattr(block, "attention", None)]
    for part, names in ATTENTION.items():
        found[part] = next((value for value in (_first(module, names) for module in around if module) if value), None)
    found |= {"down": tower.downs[index], "between": None}
    if tower.row.package == "timm":
        _of_timm(found, block, tower.attentions[index])
    else:
        found["heads"] = reach(tower.module, "config.num_attention_heads")
    missing = [part for part, value in found.items() if value is None and part not in OPTIONAL]
    if missing or found["down"].bias is None or found["gate"].bias is None:
        raise UnsupportedModel(
            f"block {index} ({type(block).__name__}) has no {', '.join(missing) or 'biases in its MLP'} that can be "
            f"read, so its patch cannot be made of weights alone: testreg.save keeps it in a checkpoint with code."
        )
    return Parts(**found)


def turned(attention: Any, tokens: Tensor, rope: Tensor) -> Tensor:
    """Queries or keys `(heads, images, tokens, width)` behind the rotation that timm's `attention` does by `rope`."""
    from timm.layers import apply_rot_embed_cat

    fixed = attention.num_prefix_tokens
    patches = tokens[:, :, fixed:].transpose(0, 1)  # (images, heads, patches, width), as timm has them
    patches = apply_rot_embed_cat(patches, rope, half=getattr(attention, "rotate_half", False))
    return torch.cat([tokens[:, :, :fixed], patches.transpose(0, 1)], dim=2)


def _of_timm(found: dict[str, Any], block: Any, attention: Any) -> None:
    """The rest of a timm block's parts: linears that lie in one are parts of it, with its memory.

    Raises:
        UnsupportedModel: the algebra does not hold in it.
    """
    keys = reach(attention, "num_kv_heads") or attention.num_heads
    plain = type(block).__name__ in BLOCKS and type(attention).__name__ in ATTENTIONS and keys == attention.num_heads
    plain = plain and isinstance(reach(attention, "q_norm") or nn.Identity(), nn.Identity)
    neurons = reach(block, "mlp.norm")
    found["between"] = None if isinstance(neurons, nn.Identity) else neurons
    norms = [found["norm1"], found["norm2"], *([found["between"]] if found["between"] is not None else [])]
    if not (plain and all(isinstance(norm, nn.LayerNorm) and norm.bias is not None for norm in norms)):
        raise UnsupportedModel(
            f"{type(block).__name__} with {type(attention).__name__} is not LayerNorm, attention, LayerNorm and MLP, "
            f"with no norm of queries and keys, so its patch cannot be made of weights alone."
        )
    found["heads"] = attention.num_heads
    if (qkv := reach(attention, "qkv")) is not None:
        apart = [reach(attention, name) for name in ("q_bias", "k_bias", "v_bias")]
        bias = qkv.bias if apart[0] is None else torch.cat(apart)
        found |= zip(("query", "key", "value"), _split(qkv.weight, bias, 3), strict=True)
    gate = found["gate"]
    if gate.out_features == 2 * found["down"].in_features:
        order = ("up", "gate") if block.mlp.gate_last else ("gate", "up")
        found |= zip(order, _split(gate.weight, gate.bias, 2), strict=True)


def _split(weight: Tensor, bias: Tensor | None, count: int) -> list[nn.Linear]:
    linears = []
    for index, rows in enumerate(weight.detach().chunk(count)):
        linear = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(rows)
        linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().chunk(count)[index]))
        linears.append(linear)
    return linears


def _first(module: nn.Module, names: tuple[str, ...]) -> Any:
    return next((part for part in (reach(module, name) for name in names) if part is not None), None)
