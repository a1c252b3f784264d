"""Which checkpoint a model is, so that a plan is not applied to another one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import BadPlan
from .towers import find_tower
from .offload import present
from .plan import RegisterPlan

ROUNDINGS = {
    torch.float64: (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    torch.float32: (torch.float32, torch.float16, torch.bfloat16),
    torch.float16: (torch.float16, torch.bfloat16),
    torch.bfloat16: (torch.bfloat16,),
}


def describe(model: nn.Module) -> dict[str, Any]:
    """What a plan's provenance says of the model that it was found on, plain JSON values: name, class, fingerprint."""
    return {"model": name(model), "class": type(model).__name__, "fingerprint": fingerprint(model)}


def name(model: nn.Module) -> str:
    """The hub name that `model` was loaded from, or the name of its directory: not where on a disk that lies."""
    given = str(getattr(model, "name_or_path", "") or "")
    return Path(given).resolve().name if Path(given).is_dir() else given


def fingerprint(model: nn.Module) -> dict[str, str]:
    """SHA-256 of the weights of the tower's blocks, once per precision that they can be rounded to.

    The blocks are what a bare tower, a model with a head and a backbone have in common, and rounding makes a plan that
    was found in float32 fit the same checkpoint in bfloat16. One weight is held at a time.

    Returns:
        Name of the dtype -> hex digest.
    """
    blocks = find_tower(model).blocks
    widest = max((weight.dtype for weight in blocks[0].state_dict().values() if weight.dtype in ROUNDINGS), key=_width)
    digests = {dtype: hashlib.sha256() for dtype in ROUNDINGS[widest]}
    for index, block in enumerate(blocks):
        with present(block):
            for key, weight in sorted(block.state_dict().items()):
                weight = weight.detach().cpu()
                for dtype, digest in digests.items():
                    rounded = weight.to(dtype) if weight.is_floating_point() else weight
                    digest.update(f"{index}.{key}{tuple(rounded.shape)}".encode())
                    digest.update(rounded.contiguous().flatten().view(torch.uint8).numpy())
    return {str(dtype).removeprefix("torch."): digest.hexdigest() for dtype, digest in digests.items()}


def check_base(plan: RegisterPlan, model: nn.Module) -> None:
    """Whether `plan` was found on the checkpoint that `model` holds; a plan that does not say so passes.

    Raises:
        BadPlan: it was found on other weights.
    """
    base = plan.provenance.get("base")
    if not isinstance(base, dict) or not isinstance(recorded := base.get("fingerprint"), dict):
        return
    actual = fingerprint(model)
    if not any(recorded.get(dtype) == digest for dtype, digest in actual.items()):
        raise BadPlan(
            f"the plan was found on {base.get('model') or 'a model'!r} ({', '.join(sorted(map(str, recorded)))}), but "
            f"{name(model) or type(model).__name__!r} has other weights: find its own registers with testreg.find, "
            f"or load the model in the precision of the plan; `testreg patch --force` takes the plan as it is."
        )


def _width(dtype: torch.dtype) -> int:
    return list(ROUNDINGS)[::-1].index(dtype)
