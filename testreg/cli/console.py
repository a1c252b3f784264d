"""How commands end: with an error in one sentence, an exit code of its kind, and nothing but what was asked for."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TextIO

import click

from ..checkpoints.atomic import replacing_file
from ..runtime.errors import (
    FamilyLeftOut,
    Harmful,
    ImagesDark,
    ImagesRepeated,
    ImagesSkipped,
    NoOutliers,
    TestregError,
)

EXITS = {NoOutliers: 3, Harmful: 4}  # 1: any other error; 2: the command line itself
INTERRUPTED = 130  # as shells have it
VALUE = r"[\w.]*\([^()]*\)"  # a call, or several values
ARGUMENT = re.compile(rf"(?:\w+=[^\s();]+|(?:\w+=)?{VALUE}) \((--[^)]+?)(?: on the command line)?\)")
# What libraries print by themselves, in logs and pipes: transformers' and the hub's bars and notes.
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}


class Command(click.Command):
    """A command whose arguments are right."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        with _options_of_others(context):
            return super().parse_args(context, args)

    def invoke(self, context: click.Context) -> Any:
        _import_torch()
        return super().invoke(context)


class Commands(click.Group):
    """Ends errors in one sentence; `--debug` shows the traceback instead."""

    command_class = Command

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        with _options_of_others(context):
            return super().parse_args(context, args)

    def invoke(self, context: click.Context) -> Any:
        for name, value in QUIET.items():
            if name != "HF_HUB_DISABLE_PROGRESS_BARS" or not sys.stderr.isatty():
                os.environ.setdefault(name, value)
        leads = _first()
        try:
            with _processes(), _own_warnings():
                return super().invoke(context)
        except KeyboardInterrupt:
            code, words = INTERRUPTED, "interrupted."
        except TestregError as error:
            if context.params.get("debug"):
                raise
            code = next((code for kind, code in EXITS.items() if isinstance(error, kind)), 1)
            leads = leads or type(error).__name__ == "Lost"  # all processes end in the same error: one says it
            words = as_options(str(error))
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:
            if context.params.get("debug") or getattr(error, "errno", None) == errno.EPIPE:  # click ends pipes
                raise
            code, words = 1, _unexpected(error)
        if leads:
            note(words)
        raise SystemExit(code)


def writable(file: Path | None, endings: Sequence[str] = ()) -> None:
    """Whether a file can be written there, before the work whose result it will hold.

    Args:
        endings: those that its name may have, as in `.csv`; none given = any.

    Raises:
        TestregError: it cannot.
    """
    if file is None:
        return
    if endings and file.suffix.lower() not in endings:
        known = " or ".join(", ".join(endings).rsplit(", ", 1))
        raise TestregError(f"{file} cannot be written: its name must end in {known}. Give another --out.")
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a directory")
        if not file.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"there is no directory {file.parent}")
        if file.exists() and not os.access(file, os.W_OK):
            raise PermissionError(errno.EACCES, "it is there, and write-protected")
        if file.is_file() or not file.exists():  # a device or a pipe needs no room beside it
            with tempfile.TemporaryFile(dir=file.resolve().parent):
                pass
    except OSError as error:
        raise TestregError(f"{file} cannot be written: {error.strerror}. Give another --out.") from error


@contextmanager
def writing(file: Path) -> Iterator[Path]:
    """Where to write what `file` shall hold when all of it is there.

    Raises:
        TestregError: it could not be written, and is what it was.
    """
    try:
        with replacing_file(file) as build:
            yield build
    except OSError as error:
        raise TestregError(f"{file} could not be written: {error.strerror or error}.") from error


def as_options(words: str) -> str:
    """What an error says, with options alone where it has an argument of Python and the option behind it in brackets.

    As in "pass replace=True (--replace)".
    """
    return ARGUMENT.sub(r"\1", words)


def note(words: str) -> None:
    """Something that is no result, for whoever watches."""
    click.echo(wrapped(f"testreg: {words}", sys.stderr), err=True)


def wrapped(words: str, stream: TextIO | None = None) -> str:
    """Sentences in lines of the terminal's width; whoever reads a file or a pipe gets them as they are."""
    if not (stream or sys.stdout).isatty():
        return words
    width = shutil.get_terminal_size().columns
    return "\n".join(
        line if line.startswith(" ") else textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
        for line in words.split("\n")
    )


@contextmanager
def _options_of_others(context: click.Context) -> Iterator[None]:
    """An option that is one of another command's, or like one of those and like none of its own, leads there."""
    try:
        yield
    except click.NoSuchOption as error:
        group = context.find_root().command
        takes: dict[str, list[str]] = {}  # option -> commands that take it
        for command in group.commands.values() if isinstance(group, click.Group) else ():
            for option in {name for parameter in command.params for name in parameter.opts}:
                takes.setdefault(option, []).append(str(command.name))
        like = get_close_matches(error.option_name, takes, n=1)
        if like and (not error.possibilities or like == [error.option_name]):
            others = ", ".join(f"`testreg {name}`" for name in sorted(takes[like[0]]))
            raise click.NoSuchOption(
                error.option_name, f"{error.message.rstrip('.')}. {like[0]} is an option of {others}.", ctx=error.ctx
            ) from None
        raise


def _unexpected(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    if "out of memory" in first or isinstance(error, MemoryError):
        return f"out of memory; a smaller --batch-size needs less: {first or 'no more to be had'}"
    return f"{type(error).__name__}: {first} (not foreseen; testreg --debug ... shows where, for a bug report)"


@contextmanager
def _own_warnings() -> Iterator[None]:
    """Warnings of this package in one line each and once, those of others, and what they log, not at all."""
    told: set[str] = set()
    before = logging.root.manager.disable

    def show(message: Warning | str, *rest: Any, **more: Any) -> None:
        if str(message) not in told:
            note(str(message))
        told.add(str(message))

    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for own in (ImagesSkipped, ImagesRepeated, ImagesDark, FamilyLeftOut):
                warnings.simplefilter("always", own)
            warnings.showwarning = show
            yield
    finally:
        logging.disable(before)


def _first() -> bool:
    """Whether this is the first of the processes that torchrun or accelerate started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _processes() -> AbstractContextManager[bool]:
    """Inside the `with`, the processes that torchrun or accelerate started know each other."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return nullcontext(True)
    _import_torch()
    from ..finding.parallel import launched

    return launched()


def _import_torch() -> None:
    """Import torch, which takes a second, in which Ctrl-C ends the process at once.

    The usual exception would go through the C++ code that is being set up, which answers by aborting.
    """
    usual = signal.default_int_handler  # where a shell has background jobs ignore Ctrl-C, they go on
    ours = signal.getsignal(signal.SIGINT) is usual and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, _end)
    try:
        import torch  # noqa: F401
    finally:
        if ours:
            signal.signal(signal.SIGINT, usual)


def _end(*_: Any) -> None:
    if _first():
        os.write(2, b"testreg: interrupted.\n")
    os._exit(INTERRUPTED)
