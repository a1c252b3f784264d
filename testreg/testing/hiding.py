"""The oracle for rows: registers that nobody attends to change nothing.

Then every mask, position, pooling and head is where it was. What the row gets wrong about them shows here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..runtime.installer import patch
from ..runtime.plan import RegisterPlan
from ..runtime.towers import find_tower
from .outputs import close, outputs

REGISTERS = 3


def check_hidden_registers(
    model: nn.Module, inputs: Mapping[str, Any], kind: str = "eager", plan: RegisterPlan | None = None
) -> None:
    """Registers of `plan`, by default three zeros from the embeddings on, change nothing where nobody attends to them.

    Args:
        kind: how the model attends meanwhile, see `attend_by`.

    Raises:
        AssertionError: they do, or the model attends in a way that cannot be watched.
    """
    plan = plan or RegisterPlan({}, registers=REGISTERS)
    tower = find_tower(attend_by(model, kind))
    lengths: list[int] = []
    with _swapped(torch.backends.mha, "get_fastpath_enabled", lambda: False):  # it calls no function of Python's
        wanted = outputs(model, inputs)
        with patch(model, plan):
            handle = tower.blocks[0].register_forward_hook(
                lambda module, args, output: lengths.append(tower.batched(output).shape[1])
            )
            outputs(model, inputs)
            handle.remove()
            with hidden(lengths[0] + plan.registers, plan.registers) as calls:
                found = outputs(model, inputs)
    blocks = len(tower.blocks) - plan.entry
    if len(calls) != blocks:
        raise AssertionError(
            f"attention over {lengths[0]} tokens and {plan.registers} registers was seen {len(calls)} times in "
            f"{blocks} blocks: registers do not reach every block's attention, or it is none of torch's softmax and "
            f"scaled_dot_product_attention."
        )
    close(found, wanted, f"{plan.registers} registers that nobody attends to, {kind}")


def attend_by(model: nn.Module, kind: str) -> nn.Module:
    """Let `model` attend by "eager" or "sdpa", in transformers' way or timm's; others have one way only."""
    if getattr(model, "_supports_sdpa", False):
        setting: Any = model
        setting.set_attn_implementation(kind)
    modules: Any = model.modules()
    for module in modules:
        if hasattr(module, "fused_attn"):
            module.fused_attn = kind == "sdpa"
    return model


@contextmanager
def hidden(length: int, registers: int) -> Iterator[list[str]]:
    """Inside the `with`, attention over `length` tokens leaves out the first `registers` keys; the list counts that."""
    calls: list[str] = []
    softmax, fused = Tensor.softmax, functional.scaled_dot_product_attention

    def hidden_softmax(scores: Tensor, *args: Any, **more: Any) -> Tensor:
        if scores.shape[-2:] == (length, length):
            calls.append("softmax")
            scores = torch.cat([torch.full_like(scores[..., :registers], float("-inf")), scores[..., registers:]], -1)
        return softmax(scores, *args, **more)

    def hidden_fused(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **more: Any
    ) -> Tensor:
        if key.shape[-2] == query.shape[-2] == length:
            calls.append("fused")
            key, value = key[..., registers:, :], value[..., registers:, :]
            attn_mask = attn_mask if attn_mask is None else attn_mask[..., registers:]
        return fused(query, key, value, attn_mask, *args, **more)

    with ExitStack() as stack:
        stack.enter_context(_swapped(Tensor, "softmax", hidden_softmax))
        stack.enter_context(_swapped(functional, "scaled_dot_product_attention", hidden_fused))
        yield calls


@contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name, owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is owner:  # it was inherited
            delattr(owner, name)
        else:
            setattr(owner, name, before)
