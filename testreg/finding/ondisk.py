"""Tensors that wait on the disk, so that they take no memory until they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from tempfile import TemporaryFile

import torch
from torch import Tensor

from ..runtime.errors import TestregError


class OnDisk(Mapping[str, Tensor]):
    """Tensors in a temporary file, from which each is read anew whenever it is asked for.

    The file has no name: it goes when this object does, however the process ends. Another process gets a plain dict.

    Raises:
        TestregError: the disk is full, or there is no folder for temporary files.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._places: dict[str, tuple[int, Tensor]] = {}  # name -> where it begins, and an empty tensor like it
        try:
            self._file = TemporaryFile(buffering=0)  # noqa: SIM115, it is open as long as this object lives
            for name, tensor in tensors.items():
                self._places[name] = self._file.tell(), torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                left = _bytes(tensor)
                while left:  # a disk that becomes full first takes a part
                    left = left[self._file.write(left) :]
        except OSError as error:
            size = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
            raise TestregError(
                f"no room for a temporary file of {size:.1f} MiB, of which up to 288 are needed ({error}): make "
                f"room, or set the environment variable TMPDIR to a folder on another disk."
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        start, like = self._places[name]
        tensor = torch.empty_like(like, device="cpu")
        self._file.seek(start)
        self._file.readinto(_bytes(tensor))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __reduce__(self) -> tuple[type[dict[str, Tensor]], tuple[dict[str, Tensor]]]:
        return dict, (dict(self),)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the CPU, or of a copy where it has gaps."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
