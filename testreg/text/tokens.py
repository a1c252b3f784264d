"""Text -> token ids, in sequences of one length."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.errors import TestregError

LENGTH = 64  # tokens of a sequence (arXiv 2410.10781, section 3.1)
SHORTEST = 32  # in a shorter one uniform attention makes the first token nearly a sink: it sees itself alone


def tokens(model: Any, text: Any, tokenizer: Any) -> Tensor:
    """Token ids `(sequences, LENGTH)` of texts, each sequence begun as the tokenizer begins a text."""
    texts = [text] if isinstance(text, (str, Path)) else list(text) if isinstance(text, Iterable) else [text]
    if not all(isinstance(one, (str, Path)) for one in texts):
        raise TestregError("text must be texts, files of text (a Path each), or token ids (sequences, tokens).")
    tokenizer = tokenizer or _tokenizer(model)
    sequences: list[list[int]] = []
    ids: list[int] = []
    for one in texts:
        ids = list(tokenizer(_read(one) if isinstance(one, Path) else one)["input_ids"])
        begin = ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
        ids = ids[len(begin) :]
        step = LENGTH - len(begin)
        sequences += [begin + ids[at : at + step] for at in range(0, len(ids) - step + 1, step)]
        ids = begin + ids
    if not sequences and len(texts) == 1 and len(ids) >= SHORTEST:
        sequences = [ids]
    if not sequences:
        raise TestregError(f"the text is too short: a text of {LENGTH} tokens at least is needed, 100 times that best.")
    return torch.tensor(sequences)


def _tokenizer(model: Any) -> Any:
    from transformers import AutoTokenizer

    name = getattr(model, "name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever a damaged file or an unreachable hub raises
        raise TestregError(
            f"there is no usable tokenizer with {name or type(model).__name__!r} ({type(error).__name__}): pass "
            f"tokenizer=transformers.AutoTokenizer.from_pretrained(NAME), or text as token ids (sequences, tokens)."
        ) from error


def _read(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TestregError(f"{path} cannot be read as text in UTF-8: {error}") from error
