"""The parts of a block that baking reads and writes, whatever its family calls them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..families import Tower, reach


@dataclass(frozen=True)
class Parts:
    """One block: `x + scale1 * out(attention(norm1(x)))`, then `x + scale2 * down(mlp(norm2(x)))`.

    Attributes:
        gate: the linear that an MLP's activation function reads; `up`: what a gated MLP multiplies the result with.
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
    down: nn.Linear
    scale2: Tensor | None
    heads: int


NAMES: dict[str, tuple[str, ...]] = {
    "norm1": ("layernorm_before", "norm1", "layer_norm1"),
    "norm2": ("layernorm_after", "norm2", "layer_norm2"),
    "gate": ("mlp.gate_proj", "mlp.fc1", "intermediate.dense"),
    "scale1": ("layer_scale1.lambda1",),
    "scale2": ("layer_scale2.lambda1",),
}
ATTENTION: dict[str, tuple[str, ...]] = {
    "query": ("q_proj", "query", "attention.query"),
    "key": ("k_proj", "key", "attention.key"),
    "value": ("v_proj", "value", "attention.value"),
    "out": ("o_proj", "out_proj", "output.dense"),
}


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
    found |= {"up": reach(block, "mlp.up_proj"), "down": tower.downs[index]}
    found["heads"] = reach(tower.module, "config.num_attention_heads")
    missing = [part for part, value in found.items() if value is None and part not in ("up", "scale1", "scale2")]
    if missing or found["down"].bias is None or found["gate"].bias is None:
        raise UnsupportedModel(
            f"block {index} ({type(block).__name__}) has no {', '.join(missing) or 'biases in its MLP'} that can be "
            f"read, so its patch cannot be made of weights alone: testreg.save keeps it in a checkpoint with code."
        )
    return Parts(**found)


def _first(module: nn.Module, names: tuple[str, ...]) -> Any:
    return next((part for part in (reach(module, name) for name in names) if part is not None), None)
