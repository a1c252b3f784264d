"""Tensors on the disk: the same bits back, in files that nobody has to clear away."""

import gc
import pickle
import sys
import tempfile
import weakref

import pytest
import torch

from testreg.finding import ondisk
from testreg.finding.ondisk import OnDisk
from testreg.runtime.errors import TestregError

TENSORS = {
    "floats": torch.tensor([[1.5, -0.0, float("nan")], [float("inf"), 1e-45, 3.0]]),
    "narrow": torch.randn(5, 3).bfloat16(),
    "mask": torch.tensor([True, False, True]),
    "shape": torch.tensor([[14, 2**40]]),
    "one": torch.tensor(7, dtype=torch.int16),
    "none": torch.zeros(0, 4),
    "turned": torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)[1:],
}


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).tolist()


@pytest.fixture
def files(monkeypatch):
    """All temporary files that were made and are still there."""
    made = weakref.WeakSet()

    def make(**options):
        file = tempfile.TemporaryFile(**options)  # noqa: SIM115
        made.add(file)
        return file

    monkeypatch.setattr(ondisk, "TemporaryFile", make)
    return made


def same(ours, theirs):
    return list(ours) == list(theirs) and all(bits(ours[name]) == bits(theirs[name]) for name in theirs)


def test_the_same_bits_come_back_again_and_again():
    stored = OnDisk(TENSORS)
    assert len(stored) == len(TENSORS)
    for name in reversed(TENSORS):
        stored[name].zero_()  # what was read is the reader's
    assert same(stored, TENSORS)
    with pytest.raises(KeyError):
        stored["other"]


def test_another_process_gets_the_tensors(files):
    stored = OnDisk(TENSORS)
    travelled = pickle.loads(pickle.dumps(stored))
    assert type(travelled) is dict
    assert len(files) == 1
    del stored
    assert same(travelled, TENSORS)


def test_a_file_goes_with_what_holds_it(files):
    stored = [OnDisk(TENSORS) for _ in range(3)]
    assert len(files) == 3
    del stored[1:]
    gc.collect()
    assert len(files) == 1
    assert same(stored[0], TENSORS)


@pytest.mark.skipif(sys.platform == "win32", reason="there, files without a name do not exist")
def test_a_killed_process_would_leave_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stored = OnDisk(TENSORS)
    assert list(tmp_path.iterdir()) == []
    assert same(stored, TENSORS)


def test_a_full_disk_is_named_with_a_way_out(files):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))  # writes part of what is asked, then no more
    try:
        with pytest.raises(TestregError, match=r"no room for a temporary file of 3\.8 MiB.*TMPDIR") as caught:
            OnDisk({"large": torch.zeros(1000, 1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert isinstance(caught.value.__cause__, OSError)
    del caught
    gc.collect()
    assert not files


def test_no_folder_for_temporary_files_is_named_too(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(TestregError, match="TMPDIR"):
        OnDisk(TENSORS)
