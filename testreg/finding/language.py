"""Has a causal language model attention sinks? Measured on text, by the published definitions; nothing is changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..metrics.sinks import received, sink_rate
from ..runtime.decoders import attentions_of, decoder_of, find_blocks
from ..runtime.errors import UnsupportedModel
from ..runtime.guard import PATCHES
from ..text.tokens import check, tokens
from .observe import eager
from .still import quiet
from .text_inspection import FIRST, TextBlock, TextInspection

MASSIVE = (100.0, 1000.0)  # a massive activation: its magnitude, and that over the median one (arXiv 2402.17762)


def inspect(model: Any, text: Any, *, tokenizer: Any = None, batch_size: int = 16) -> TextInspection:
    """Look for attention sinks and massive activations of `model`, or of the language model that it holds.

    Args:
        model: a causal language model, or a model of transformers that holds one.
        text: a text, a file of text (a `Path`), or several; or token ids `(sequences, tokens)`, used as they are.
        tokenizer: by default the one that lies with the model's checkpoint.
        batch_size: sequences per forward pass.

    Raises:
        TestregError: there is no tokenizer, too little text, or an id that the model does not know.
        UnsupportedModel: it is no causal language model, or gives no attention maps.
    """
    blocks = find_blocks(model)
    ids = text if isinstance(text, Tensor) else tokens(model, text, tokenizer)
    check(model, ids)
    decoder, device = decoder_of(model), next(model.parameters()).device
    with quiet(model), eager(model), _watch(blocks) as seen:
        if getattr(decoder.config, "_attn_implementation", None) != "eager":
            raise UnsupportedModel(
                f"{type(model).__name__} cannot change its attention implementation, and the one it has gives no "
                f'attention maps: load it with attn_implementation="eager".'
            )
        # Older models give maps only where they are asked to; newer ones always do, and asked keep hooks for good.
        asked = {} if getattr(decoder, "_can_record_outputs", None) else {"output_attentions": True}
        for batch in ids.split(batch_size):
            decoder(input_ids=batch.to(device), use_cache=False, **asked)
    return _sum_up(model, blocks, seen)


def kind_of(attention: nn.Module) -> str:
    """Which kind of attention a module is, by what it holds."""
    if any("sink" in name for name, _ in attention.named_parameters()):
        return "sink logits"
    if any("gate" in name or name == "g_proj" for name, _ in attention.named_children()):
        return "gated"
    parts = [getattr(attention, f"{name}_proj", None) for name in "qkvo"]
    if not all(isinstance(part, nn.Linear) for part in parts):
        return "plain"
    query, key, value, out = (part.weight.shape for part in parts if part is not None)  # (outputs, inputs) each
    # A query projection that makes the gates too is twice as wide as the queries of all heads, where a query is as wide
    # as a key, and the output projection tells how many heads there are.
    twice = query[0] * value[0] == 2 * out[1] * key[0]
    return "gated" if twice else "plain"


Seen = dict[str, list[Tensor]]


@contextmanager
def _watch(blocks: list[nn.Module]) -> Iterator[list[Seen]]:
    """Per block, each a list over batches: `state` (sequences, tokens) norms, `peak` and `median` (sequences,)
    magnitudes; where it attends by softmax, `rate` and `received` (sequences, tokens) and `taken` (sequences,)."""
    seen: list[Seen] = [defaultdict(list) for _ in blocks]

    def state(kept: Seen) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states = (output[0] if isinstance(output, tuple) else output).float()  # (sequences, tokens, channels)
            kept["state"].append(states.norm(dim=-1).cpu())
            magnitudes = states.abs().flatten(1)
            kept["peak"].append(magnitudes.amax(1).cpu())
            kept["median"].append(magnitudes.median(1).values.cpu())

        return hook

    def maps(kept: Seen) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for part in output[1:] if isinstance(output, tuple) else ():
                if isinstance(part, Tensor) and part.ndim == 4 and part.shape[-1] == part.shape[-2]:
                    if part.triu(1).any():
                        raise UnsupportedModel(
                            f"{type(module).__name__} attends to later tokens as well: it is not causal, and the "
                            f"sinks of its first tokens are not defined."
                        )
                    alpha = received(part, causal=True)  # (sequences, heads, tokens)
                    kept["rate"].append(sink_rate(part[None], causal=True).cpu())
                    kept["received"].append(alpha.mean(1).cpu())
                    kept["taken"].append(1 - part.float().sum(-1).mean((1, 2)).cpu())
                    return

        return hook

    handles = [block.register_forward_hook(state(kept)) for block, kept in zip(blocks, seen, strict=True)]
    for block, kept in zip(blocks, seen, strict=True):
        handles += [attention.register_forward_hook(maps(kept)) for attention in attentions_of(block)[:1]]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _sum_up(model: nn.Module, blocks: list[nn.Module], seen: list[Seen]) -> TextInspection:
    whole = [{name: torch.cat(parts) for name, parts in kept.items()} for kept in seen]
    softmax = [index for index, block in enumerate(whole) if "rate" in block]
    if not softmax:
        raise UnsupportedModel(
            f"{type(model).__name__} gives no attention maps, with the eager implementation either: whether it has "
            f"sinks cannot be seen."
        )
    rates = torch.stack([whole[index]["rate"] for index in softmax]).mean(0)  # (sequences, tokens)
    taken = torch.stack([whole[index]["taken"] for index in softmax]).mean()
    kinds = {kind_of(attentions_of(blocks[index])[0]) for index in softmax}
    sequences, length = rates.shape
    return TextInspection(
        kind=next((kind for kind in ("sink logits", "gated") if kind in kinds), "plain"),
        rates=tuple(rates[:, :FIRST].mean(0).tolist()),
        elsewhere=float(rates[:, FIRST : length // 2].amax(1).mean()),
        taken=float(taken.clamp(min=0)),
        blocks=tuple(_block(block) for block in whole),
        sequences=sequences,
        tokens=length,
        registers=_registers(model),
    )


def _registers(model: nn.Module) -> int:
    patches = decoder_of(model).__dict__.get(PATCHES)
    return patches[-1].plan.registers if patches else 0


def _block(values: dict[str, Tensor]) -> TextBlock:
    times = values["peak"] / values["median"].clamp(min=torch.finfo(torch.float32).tiny)
    massive = (values["peak"] > MASSIVE[0]) & (times >= MASSIVE[1])
    softmax = "rate" in values
    return TextBlock(
        median=float(values["state"].median()),
        largest=float(values["state"].max()),
        activation=float(values["peak"].max()),
        times=float(times.max()),
        massive=float(massive.float().mean()),
        sink=float(values["rate"][:, 0].mean()) if softmax else None,
        received=float(values["received"][:, 0].mean()) if softmax else None,
    )
