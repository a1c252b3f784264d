"""Calibration over several processes: each looks at its share of the images, the first one decides for all.

`torchrun` and `accelerate launch` start the processes; whoever calls `find` from Python starts them as usual, with
`accelerate.Accelerator()` or `torch.distributed.init_process_group()`. Statistics travel between the hosts' memories
through gloo, on machines with GPUs too: they are small, they lie there anyway, and a lost process closes its
connection, which ends the others at once where they wait for it. Those still at work are ended by the launcher, or,
without one, as soon as they have counted their own images.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from io import StringIO
from typing import Any, TypeVar

import torch
from torch import distributed

from ..runtime.errors import TestregError

WAIT = timedelta(days=7)  # for others that are at work; one that is lost ends the wait at once


class Lost(TestregError):
    """Another process ended before the work was done."""


Part = TypeVar("Part")
Result = TypeVar("Result")


@contextmanager
def launched() -> Iterator[bool]:
    """Inside the `with`, the processes that a launcher started know each other, and each has its own GPU.

    It gives whether this is the first process; the others print nothing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        yield leads()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    with _told("another process did not start"):
        distributed.init_process_group("gloo")
    try:
        with nullcontext() if leads() else redirect_stdout(StringIO()):
            yield leads()
    finally:
        distributed.destroy_process_group()


def share() -> tuple[int, int]:
    """Which of how many processes this is, from 0; (0, 1) where it is alone."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def leads() -> bool:
    """Whether this process is the one that decides, prints and writes."""
    return share()[0] == 0


def shared(look: Callable[[], Part], decide: Callable[[list[Part]], Result]) -> Result:
    """What `decide` makes, in the first process alone, of what `look` gives in every process, in their order.

    Every process has to call this, and gets the same result, or the same error, whoever it was that failed.

    Raises:
        Lost: another process ended meanwhile.
    """
    rank, size = share()
    if size == 1:
        return decide([look()])
    with _told("another process was lost before its images were counted"):
        if distributed.get_backend() == "gloo":
            distributed.barrier()  # a group would wait for a lost process; this notices at once
        group: Any = distributed.new_group(backend="gloo", timeout=WAIT)
    try:
        mine, failure = _tried(look)
        parts: list[Any] = [None] * size
        with _told("another process was lost before its images were counted"):
            distributed.gather_object((mine, _plain(failure)), parts if rank == 0 else None, dst=0, group=group)
        outcome: list[Any] = [None, None]
        if rank == 0:
            failed = next((failure for _, failure in parts if failure), None)
            outcome = [None, failed] if failed else list(_tried(lambda: decide([part for part, _ in parts])))
            failure = failure or outcome[1]
            outcome[1] = _plain(outcome[1])
        with _told("the first process was lost before it decided"):
            distributed.broadcast_object_list(outcome, src=0, group=group)
    finally:
        distributed.destroy_process_group(group)
    if failure or outcome[1]:
        raise failure or outcome[1]
    result: Result = outcome[0]
    return result


def _tried(make: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return make(), None
    except Exception as error:  # handed to the other processes, and raised here too
        return None, error


def _plain(error: Exception | None) -> Exception | None:
    """An error that can travel: one of this package as it is, any other by its words."""
    if error is None or isinstance(error, TestregError):
        return error
    return TestregError(f"process {share()[0]} of {share()[1]} failed: {type(error).__name__}: {error}")


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of the connection, in words."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(
            f"{what}: its own message, or the launcher's, says why. Nothing was written; start again."
        ) from error
