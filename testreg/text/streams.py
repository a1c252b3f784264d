"""Texts -> token ids in sequences of one length, one after the other: memory does not grow with the text."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.errors import BadText

PIECE = 2**16  # characters that are made to tokens at once
MOST_UNKNOWN = 0.5  # of a sequence's tokens: of no text in any language that a tokenizer is for
ENDINGS = (".txt", ".md", ".rst", ".text")  # of files in a folder that are text


class Texts:
    """Sequences `(length,)` of token ids, each begun as the tokenizer begins a text; a shorter rest is left out.

    Args:
        text: a text; a file, or a folder of files (a `Path` each); a dataset whose rows have a column "text"; token ids
            `(tokens,)`, cut here, or `(sequences, length)`, taken as they are; or several of the first three.
        tokenizer: by default the model's own `tokenizer`, or the one that lies with its checkpoint; another one, or the
            name of a checkpoint that has it.
        length: tokens of a sequence, its start token among them.
        limit: the most tokens that are given.
        joined: texts follow one another, since most data sets have many short ones; else each begins a sequence.

    Attributes:
        texts, tokens: how many were read.
        rest: what was left at the end, begun as a sequence is.

    Raises:
        BadText: there is no tokenizer, or something that is no text.
    """

    def __init__(
        self,
        model: Any,
        text: Any,
        tokenizer: Any = None,
        *,
        length: int,
        limit: int | None = None,
        joined: bool = True,
    ):
        self.model, self.text, self.length, self.limit, self.joined = model, text, length, limit, joined
        self.ids = text if isinstance(text, Tensor) else None
        self._tokenizer = tokenizer
        self.texts = self.tokens = 0
        self.rest = torch.empty(0, dtype=torch.long)

    @property
    def tokenizer(self) -> Any:
        """What makes tokens of text; looked for where none was given."""
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self.model)
        elif isinstance(self._tokenizer, (str, Path)):
            self._tokenizer = tokenizer_named(self._tokenizer)
        if not callable(self._tokenizer) or not hasattr(self._tokenizer, "bos_token_id"):
            raise BadText(
                f"tokenizer must be one of transformers, or the name of a checkpoint that has it, not a "
                f"{type(self._tokenizer).__name__}."
            )
        return self._tokenizer

    def __iter__(self) -> Iterator[Tensor]:
        self.texts = self.tokens = 0
        for sequence in self._given(self.ids) if self.ids is not None else self._read():
            if self.limit is not None and self.tokens + len(sequence) > self.limit:
                return
            self.tokens += len(sequence)
            yield sequence

    def nothing(self, sequences: int = 1) -> str:
        """What to say where there is no sequence.

        Args:
            sequences: that are needed at least.
        """
        if self.text is None or not self.texts:
            return f"there is no text: give a text, a file or a folder of files ({', '.join(ENDINGS)}), or token ids."
        several = self.text if isinstance(self.text, (list, tuple)) else [self.text]
        names = [one for one in several if isinstance(one, str) and os.path.exists(one)]  # of any length
        if names:
            return (
                f"the text is too short, and {names[0]!r} is the name of a file or folder: give "
                f"pathlib.Path({names[0]!r}) to read that."
            )
        return (
            f"the text is too short: {self.length * sequences:,} tokens at least are needed, {self.length * 100:,} are "
            f"best, and {len(self.rest)} were given."
        )

    def _given(self, ids: Tensor) -> Iterator[Tensor]:
        self.texts, self.rest = int(ids.numel() > 0), ids.flatten()[:0]
        if ids.is_floating_point() or ids.ndim not in (1, 2):
            raise BadText(
                f"token ids must be whole numbers (tokens,) or (sequences, tokens), not {ids.dtype} of shape "
                f"{tuple(ids.shape)}."
            )
        if ids.ndim == 2:
            yield from ids
            return
        whole = len(ids) // self.length * self.length
        self.rest = ids[whole:]
        yield from ids[:whole].view(-1, self.length)

    def _read(self) -> Iterator[Tensor]:
        held: list[int] = []
        for text in _texts(self.text):
            self.texts += 1
            held = held if self.joined else []
            for piece in text:  # what cannot be read is told before a tokenizer is looked for
                step = self.length - len(self.begin)
                held += _body(self.tokenizer, piece, self.begin)
                while len(held) >= step:
                    yield self._known(torch.tensor(self.begin + held[:step]))
                    held = held[step:]
        self.rest = torch.tensor(self.begin + held if held else [], dtype=torch.long)

    def _known(self, sequence: Tensor) -> Tensor:
        """The sequence.

        Raises:
            BadText: the tokenizer does not know most of it.
        """
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        share = 0.0 if unknown is None else float((sequence == unknown).float().mean())
        if share > MOST_UNKNOWN:
            raise BadText(
                f"the tokenizer does not know {share:.0%} of the text (its token {self.tokenizer.unk_token!r}): it is "
                f"another model's, or the text is none. Pass tokenizer=NAME (--tokenizer NAME), a checkpoint that has "
                f"the model's."
            )
        return sequence

    @cached_property
    def begin(self) -> list[int]:
        """The start token, where the tokenizer begins every text with one."""
        ids = list(self.tokenizer("a")["input_ids"])
        return ids[:1] if ids and ids[0] == self.tokenizer.bos_token_id else []


def start_of(model: Any, tokenizer: Any) -> int | None:
    """The token that a text of the model begins with, by its tokenizer (or the name of one) or its config."""
    if isinstance(tokenizer, (str, Path)):
        tokenizer = tokenizer_named(tokenizer)
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    known = model.get_input_embeddings().num_embeddings
    for source in (tokenizer, model.config.get_text_config(), getattr(model, "generation_config", None)):
        token = getattr(source, "bos_token_id", None)
        if isinstance(token, int) and 0 <= token < known:
            return token
    return None


def digest(sequence: Tensor) -> str:
    """SHA-256 of a sequence's ids."""
    return hashlib.sha256(sequence.long().contiguous().numpy().tobytes()).hexdigest()


def tokenizer_of(model: Any) -> Any:
    """The tokenizer that a model was given as its `tokenizer`, or that lies with its checkpoint.

    Raises:
        BadText: there is none.
    """
    own, name = getattr(model, "tokenizer", None), getattr(model, "name_or_path", "")
    if callable(own):
        return own
    if not name:
        raise BadText(
            f"there is no usable tokenizer with this {type(model).__name__}, which came from no checkpoint: pass "
            f"tokenizer=NAME (--tokenizer NAME), a checkpoint that has the model's."
        )
    return tokenizer_named(name)


def tokenizer_named(name: str | Path) -> Any:
    """The tokenizer that lies with a checkpoint.

    Raises:
        BadText: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(Path(name).expanduser() if Path(name).expanduser().exists() else name)
    except Exception as error:  # whatever a damaged file or an unreachable hub raises
        raise BadText(
            f"there is no usable tokenizer with {str(name)!r} ({type(error).__name__}): pass tokenizer=NAME "
            f"(--tokenizer NAME), a checkpoint that has the model's."
        ) from error


def existing(path: Path) -> Path:
    """The path of a file or folder that exists, `~` expanded.

    Raises:
        BadText: there is none.
    """
    full = path.expanduser()
    if not full.exists():
        raise BadText(f"there is no file or folder {str(path)!r} of text.")
    return full


def _body(tokenizer: Any, piece: str, begin: list[int]) -> list[int]:
    return list(tokenizer(piece)["input_ids"])[len(begin) :]


def _texts(text: Any) -> Iterator[Iterator[str]]:
    """Every text, in pieces."""
    if isinstance(text, str):
        yield _pieces(iter([text]))
    elif isinstance(text, Path):
        for file in _files(text):
            yield _pieces(_lines(file))
    elif isinstance(text, Mapping) and isinstance(text.get("text"), str):
        yield _pieces(iter([text["text"]]))
    elif isinstance(text, Iterable) and not isinstance(text, (bytes, Mapping)):
        for one in text:
            yield from _texts(one)
    else:
        raise BadText(
            "text must be texts, files of text (a Path each), rows with a column 'text', or a tensor of token ids "
            f"(sequences, tokens), not a {type(text).__name__}."
        )


def _files(path: Path) -> list[Path]:
    path = existing(path)
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
    if not found:
        raise BadText(f"{path} holds no text: files ending in {', '.join(ENDINGS)} are read.")
    return found


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise BadText(
            f"{path} cannot be read as text in UTF-8: {error}. Write it in UTF-8 (iconv does), or leave it out."
        ) from error


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    """Lines, in pieces that end where a line does."""
    held = ""
    for line in lines:
        held += line
        if len(held) >= PIECE:
            yield held
            held = ""
    if held:
        yield held
