"""Which checkpoint a model is, so that a plan is not applied to another one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .decoders import matrix, tower_of
from .errors import BadPlan
from .offload import present
from .plan import RegisterPlan
from .towers import Tower, find_tower

ROUNDINGS = {
    torch.float64: (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    torch.float32: (torch.float32, torch.float16, torch.bfloat16),
    torch.float16: (torch.float16, torch.bfloat16),
    torch.bfloat16: (torch.bfloat16,),
}


def describe(model: nn.Module, neurons: Mapping[int, tuple[int, ...]], tower: Tower | None = None) -> dict[str, Any]:
    """What a plan's provenance says of the model that it was found on, plain JSON values: name, class, fingerprints.

    Args:
        tower: what the plan is for; by default the model's vision tower.
    """
    tower = tower or find_tower(model)
    return {
        "model": name(model),
        "class": type(model).__name__,
        "fingerprint": fingerprint(model, tower),
        "columns": columns(tower, neurons),
    }


def name(model: nn.Module) -> str:
    """The hub name that `model` was loaded from, or the name of its directory: not where on a disk that lies."""
    given = str(getattr(model, "name_or_path", "") or "")
    return Path(given).resolve().name if Path(given).is_dir() else given


def fingerprint(model: nn.Module, tower: Tower | None = None) -> dict[str, str]:
    """SHA-256 of the weights of the tower's blocks, once per precision that they can be rounded to.

    The blocks are what a bare tower, a model with a head and a backbone have in common, and rounding makes a plan that
    was found in float32 fit the same checkpoint in bfloat16. One weight is held at a time.

    Returns:
        Name of the dtype -> hex digest.
    """
    blocks = (tower or find_tower(model)).blocks
    widest = max((weight.dtype for _, weight in _weights(blocks[0]) if weight.dtype in ROUNDINGS), key=_width)
    digests = {dtype: hashlib.sha256() for dtype in ROUNDINGS[widest]}
    for index, block in enumerate(blocks):
        with present(block):
            for key, weight in _weights(block):
                _update(digests, f"{index}.{key}", weight)
    return _named(digests)


def columns(tower: Tower, neurons: Mapping[int, tuple[int, ...]]) -> dict[str, str]:
    """As `fingerprint`, of what `neurons` write alone: their columns of the second linears. It costs next to nothing.

    Returns:
        Name of the dtype -> hex digest; nothing where a second linear has no plain weight.
    """
    weights: dict[int, Tensor] = {}
    for block, row in neurons.items():
        down: Any = tower.downs[block]
        with present(down):
            weight = getattr(down, "weight", None)
            if not isinstance(weight, Tensor) or weight.is_meta or weight.dtype not in ROUNDINGS or weight.ndim != 2:
                return {}
            if type(weight.detach()) is not Tensor:  # quantised, or a shard of it
                return {}
            weights[block] = matrix(down).detach()[:, list(row)]  # (channels, neurons)
    if not weights:
        return {}
    digests = {dtype: hashlib.sha256() for dtype in ROUNDINGS[max((w.dtype for w in weights.values()), key=_width)]}
    for block, weight in weights.items():
        _update(digests, str(block), weight)
    return _named(digests)


def fits(plan: RegisterPlan, tower: Tower) -> bool:
    """Whether `plan` was found on the weights of `tower`, by what its neurons write; also where it does not say so."""
    base = plan.provenance.get("base")
    recorded = base.get("columns") if isinstance(base, Mapping) else None
    actual = columns(tower, plan.neurons) if isinstance(recorded, Mapping) and recorded else {}
    shared = [dtype for dtype in actual if dtype in recorded]  # type: ignore[operator]
    return not shared or any(recorded[dtype] == actual[dtype] for dtype in shared)  # type: ignore[index]


def _weights(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a block by their names; of quantised ones the numbers that they stand for."""
    for key, value in sorted(block.state_dict().items()):
        for weight in value if isinstance(value, tuple) else (value,):
            if isinstance(weight, Tensor):
                plain = type(weight) is Tensor and not weight.is_quantized
                yield key, weight if plain or hasattr(weight, "device_mesh") else weight.dequantize()


def _update(digests: Mapping[torch.dtype, Any], key: str, weight: Tensor) -> None:
    weight = weight.detach().cpu()
    for dtype, digest in digests.items():
        rounded = weight.to(dtype) if weight.is_floating_point() else weight
        digest.update(f"{key}{tuple(rounded.shape)}".encode())
        digest.update(rounded.contiguous().flatten().view(torch.uint8).numpy())


def _named(digests: Mapping[torch.dtype, Any]) -> dict[str, str]:
    return {str(dtype).removeprefix("torch."): digest.hexdigest() for dtype, digest in digests.items()}


def check_base(plan: RegisterPlan, model: nn.Module) -> None:
    """Whether `plan` was found on the checkpoint that `model` holds; one that does not say so passes, unless it comes
    from the hub.

    Raises:
        BadPlan: it was found on other weights, or a stranger's plan does not say on which.
    """
    base, hub = plan.provenance.get("base"), plan.provenance.get("hub")
    if not isinstance(base, dict) or not isinstance(recorded := base.get("fingerprint"), dict):
        if isinstance(hub, dict):
            raise BadPlan(
                f"the plan of {hub.get('name')} does not say on which weights it was found, so nothing vouches for it: "
                f"take it only if you know whose it is, with RegisterPlan.load(..., force=True) (--force)."
            )
        return
    actual = fingerprint(model, tower_of(model, plan))
    if not any(recorded.get(dtype) == digest for dtype, digest in actual.items()):
        raise BadPlan(
            f"the plan was found on {base.get('model') or 'a model'!r} ({', '.join(sorted(map(str, recorded)))}), but "
            f"{name(model) or type(model).__name__!r} has other weights: find its own registers with testreg.find, "
            f"or load the model in the precision of the plan; `testreg patch --force` takes the plan as it is."
        )


def _width(dtype: torch.dtype) -> int:
    return list(ROUNDINGS)[::-1].index(dtype)
