"""How commands end: with an error in one sentence, an exit code of its kind, and nothing but what was asked for."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click

from .errors import Harmful, ImagesSkipped, NoOutliers, TestregError

EXITS = {NoOutliers: 3, Harmful: 4}  # 1: any other error; 2: the command line itself
INTERRUPTED = 130  # as shells have it
# What libraries print by themselves, in logs and pipes: transformers' and the hub's bars and notes.
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}


class Commands(click.Group):
    """Ends errors in one sentence; `--debug` shows the traceback instead."""

    def invoke(self, context: click.Context) -> Any:
        for name, value in QUIET.items():
            if name != "HF_HUB_DISABLE_PROGRESS_BARS" or not sys.stderr.isatty():
                os.environ.setdefault(name, value)
        with _processes() as leads, _own_warnings():
            try:
                return super().invoke(context)
            except KeyboardInterrupt:
                code, words = INTERRUPTED, "interrupted."
            except TestregError as error:
                if context.params.get("debug"):
                    raise
                code = next((code for kind, code in EXITS.items() if isinstance(error, kind)), 1)
                leads = leads or type(error).__name__ == "Lost"  # all processes end in the same error: one says it
                words = str(error)
            except (click.ClickException, click.Abort, click.exceptions.Exit):
                raise
            except Exception as error:
                if context.params.get("debug") or getattr(error, "errno", None) == errno.EPIPE:  # click ends pipes
                    raise
                code, words = 1, _unexpected(error)
            if leads:
                click.echo(f"testreg: {words}", err=True)
            raise SystemExit(code)


def writable(file: Path | None) -> None:
    """Whether a file can be written there, before the work whose result it will hold.

    Raises:
        TestregError: it cannot.
    """
    if file is None:
        return
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a directory")
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise TestregError(f"{file} cannot be written: {error.strerror}. Give another --out.") from error


def _unexpected(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    if "out of memory" in first or isinstance(error, MemoryError):
        return f"out of memory; a smaller --batch-size needs less: {first or 'no more to be had'}"
    return f"{type(error).__name__}: {first} (not foreseen; testreg --debug ... shows where, for a bug report)"


@contextmanager
def _own_warnings() -> Iterator[None]:
    """Warnings of this package in one line each and once, those of others not at all."""
    told: set[str] = set()

    def show(message: Warning | str, *rest: Any, **more: Any) -> None:
        if str(message) not in told:
            click.echo(f"testreg: {message}", err=True)
        told.add(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ImagesSkipped)
        warnings.showwarning = show
        yield


def _processes() -> AbstractContextManager[bool]:
    """Whether this process is the first of those that torchrun or accelerate started, or the only one."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return nullcontext(True)
    from .parallel import launched

    return launched()
