"""Which token ids a language model is given: its tokenizer, its start token, and whether ids are the model's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..runtime.errors import BadText
from .streams import Texts

LENGTH = 64  # tokens of a sequence (arXiv 2410.10781, section 3.1)
MOST = 256 * LENGTH  # tokens that are looked at
SHORTEST = 32  # in a shorter one uniform attention makes the first token nearly a sink: it sees itself alone


def tokens(model: Any, text: Any, tokenizer: Any) -> Tensor:
    """Token ids `(sequences, LENGTH)` of texts, each sequence begun as the tokenizer begins a text.

    A text alone that is shorter makes one sequence of its own length.
    """
    texts = Texts(model, text, tokenizer, length=LENGTH, limit=MOST, joined=False)
    sequences = list(texts)
    if not sequences and texts.texts == 1 and len(texts.rest) >= SHORTEST:
        sequences = [texts.rest]
    if not sequences:
        raise BadText(texts.nothing())
    return torch.stack(sequences)


def check(model: Any, ids: Tensor) -> None:
    """Whether `model` can read `ids` `(sequences, tokens)`.

    Raises:
        BadText: they are of another shape, too short, or not its own.
    """
    known = model.get_input_embeddings().num_embeddings
    if ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] < SHORTEST or not len(ids):
        raise BadText(
            f"text must be token ids (sequences, tokens) with {SHORTEST} tokens at least, not {ids.dtype} of shape "
            f"{tuple(ids.shape)}."
        )
    if not 0 <= int(ids.min()) <= int(ids.max()) < known:
        raise BadText(
            f"the text has ids from {ids.min()} to {ids.max()}; the model knows 0 to {known - 1}: its tokenizer is "
            f"another one."
        )
