"""Patches in the space that a model shares with text, as open-vocabulary segmentation reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..finding.observe import KEYS, QUERIES
from ..runtime.errors import BadImages, UnsupportedModel
from ..runtime.paths import reach
from ..runtime.towers import Tower

NORMS = ("post_layernorm", "ln_post")
PROJECTIONS = ("visual_projection", "visual.proj")


def in_text_space(model: nn.Module, tower: Tower, patches: Tensor) -> Tensor:
    """What a two-tower model makes of patches, each for itself, as it does of its class token.

    Args:
        patches: after the last block, or of its attention alone, `(..., channels)`.

    Returns:
        `(..., width of the shared space)`, on the CPU.

    Raises:
        UnsupportedModel: the model has no norm and projection, or pooling head, behind its vision tower.
    """
    norm, head = reach(tower.module, NORMS), reach(tower.module, "head")
    projection = reach(model, PROJECTIONS)
    if norm is None or (projection is None and not isinstance(head, nn.Module)):
        raise UnsupportedModel(
            f"{type(model).__name__} does not show how patches compare with text: a model of CLIP's kind is needed, "
            f"whole, as of AutoModel.from_pretrained, with {' or '.join(NORMS)} in its vision tower and "
            f"{' or '.join(PROJECTIONS)} or a pooling head behind it."
        )
    weight = next(norm.parameters())
    with torch.no_grad():
        normed = norm(patches.to(weight.device, weight.dtype))
        if projection is None:  # SigLIP's head pools what attends to nothing but itself
            pooled: Tensor = head(normed.reshape(-1, 1, normed.shape[-1]))
            return pooled.view(*patches.shape[:-1], -1).float().cpu()
        placed = normed @ projection if isinstance(projection, Tensor) else projection(normed)
        return placed.float().cpu()


def texts(model: Any, prompts: Sequence[str], tokenizer: Any = None) -> Tensor:
    """What a two-tower model makes of texts, `(prompts, width of the shared space)` on the CPU.

    Args:
        tokenizer: by default the one that lies with the checkpoint; of an open_clip model, that of its `get_tokenizer`.

    Raises:
        BadImages: there is none.
        UnsupportedModel: the model reads no text.
    """
    if not hasattr(model, "get_text_features") and not hasattr(model, "encode_text"):
        raise UnsupportedModel(f"{type(model).__name__} reads no text: a model of CLIP's kind is needed, whole.")
    if tokenizer is None:
        from transformers import AutoTokenizer  # slow to import, and most models read no text

        try:
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        except Exception as error:  # whatever a missing or damaged file raises
            name = getattr(model, "name_or_path", "")
            raise BadImages(
                f"no tokenizer lies with {name!r}: set the task's tokenizer, as in tokenizer=..."
            ) from error
    device = next(model.parameters()).device
    with torch.no_grad():
        if not hasattr(model, "get_text_features"):
            return model.encode_text(tokenizer(list(prompts)).to(device)).float().cpu()
        # SigLIP was trained on texts that are padded to their full length.
        full = "siglip" in str(getattr(getattr(model, "config", None), "model_type", ""))
        length = "max_length" if full else True
        tokens: Mapping[str, Tensor] = tokenizer(list(prompts), padding=length, truncation=True, return_tensors="pt")
        found = model.get_text_features(**{name: value.to(device) for name, value in tokens.items()})
        return getattr(found, "pooler_output", found).float().cpu()


@contextmanager
def keys_as_queries(tower: Tower, block: int) -> Iterator[None]:
    """Inside the `with`, a block's tokens attend by what they are and not by what they seek: keys to keys.

    Raises:
        UnsupportedModel: its queries and keys are not made by linears that are known.
    """
    attention = tower.attentions[block]
    parts = {name.split(".")[-1]: part for name, part in attention.named_modules()}
    query, key = ([parts[name] for name in which.names if name in parts] for which in (QUERIES, KEYS))
    fused = [parts[name] for name in ("qkv", "in_proj") if name in parts]
    weights = [reach(attention, f"in_proj_{name}") for name in ("weight", "bias")]

    def first_third(module: Any, args: Any, output: Tensor) -> Tensor:
        _, keys, values = output.chunk(3, dim=-1)
        return torch.cat([keys, keys, values], dim=-1)

    if query and key:
        handle = query[0].register_forward_hook(lambda module, args, output: key[0](args[0]))
    elif fused:
        handle = fused[0].register_forward_hook(first_third)
    elif isinstance(weights[0], Tensor):
        handle = _Replaced([weight for weight in weights if weight is not None])
    else:
        raise UnsupportedModel(
            f"the attention of {type(tower.module).__name__} ({type(attention).__name__}) has no query and key "
            f"projection that is known, so its keys cannot attend to its keys."
        )
    try:
        yield
    finally:
        handle.remove()


class _Replaced:
    """The first third of fused weights holds what the second does, until `remove`."""

    def __init__(self, weights: list[Tensor]):
        self.before = [(weight, weight.detach().chunk(3)[0].clone()) for weight in weights]
        for weight, _ in self.before:
            queries, keys, _ = weight.detach().chunk(3)
            queries.copy_(keys)

    def remove(self) -> None:
        for weight, queries in self.before:
            weight.detach().chunk(3)[0].copy_(queries)
