"""A directory, or a file, that is either the old one or the new one, whole, at every moment."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

OLD = "-old"


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new directory beside `target` to write into, which takes its place when the `with` ends without an exception.

    Everything is on the disk before the swap, and the swap is one system call (Linux, macOS); elsewhere it is two
    renames, and a crash between them leaves the old directory beside the target under a hidden name. What killed
    processes left beside the target is cleared away.

    Raises:
        OSError: the disk is full, or the place cannot be written. The target is what it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear(target)
    build = target.parent / f"{_prefix(target)}{secrets.token_hex(4)}"
    build.mkdir()
    handle = os.open(build, os.O_RDONLY) if fcntl else None
    try:
        if handle is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)  # other processes see that this directory is at work
        yield build
        for path in build.iterdir():
            path.chmod(build.stat().st_mode & 0o666)  # readable for whom the directory is; safetensors keeps others out
            _sync(path)
        _sync(build)
        _swap(build, target)
        _sync(target.parent)
    finally:
        if handle is not None:
            os.close(handle)
        shutil.rmtree(build, ignore_errors=True)  # the unfinished directory, or the old one


@contextmanager
def replacing_file(file: Path) -> Iterator[Path]:
    """A new file beside `file` to write into, which takes its place when the `with` ends without an exception.

    Its name ends alike. A link stays one; a device or a pipe is written itself.

    Raises:
        OSError: the disk is full, or the place cannot be written. The file is what it was.
    """
    target = file.resolve()
    if target.exists() and not target.is_file():
        yield target
        return
    build = target.with_name(f".{target.stem}.testreg-{secrets.token_hex(4)}{target.suffix}")
    try:
        yield build
        os.replace(build, target)
    finally:
        build.unlink(missing_ok=True)


def _prefix(target: Path) -> str:
    return f".{target.name}.testreg-"


def _clear(target: Path) -> None:
    """Remove what killed processes left, and nothing that a living one is writing."""
    for left in target.parent.glob(f"{_prefix(target)}*") if fcntl else ():
        if left.name.endswith(OLD) and not target.exists():
            continue  # a crash between two renames: the only copy
        with suppress(OSError):
            handle = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(handle)


def _swap(build: Path, target: Path) -> None:
    if not target.exists():
        os.rename(build, target)
    elif not _exchange(build, target):
        old = build.with_name(f"{build.name}{OLD}")
        os.rename(target, old)
        try:
            os.rename(build, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Two directories change places in one step; False where the system or the file system cannot do it."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return libc.renamex_np(os.fsencode(one), os.fsencode(other), 2) == 0  # RENAME_SWAP
        here = -100  # AT_FDCWD
        return libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), 2) == 0  # RENAME_EXCHANGE
    except (AttributeError, OSError, TypeError):
        return False


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handles of directories to flush
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
