"""Where a checkpoint may be written, and that a directory holds the old one or the new one, never half of one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import transformers as hf
from patched_models import DYNAMIC, contents, patched
from zoo import build

import testreg
from testreg import BadCheckpoint, TestregError, UnsupportedModel
from testreg.checkpoints import atomic

# Where to write


def test_an_unpatched_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TestregError, match="not patched"):
        testreg.save(build("ViTModel")[0], tmp_path / "clean")
    mine = type("Mine", (hf.ViTModel,), {"__module__": "mine"})(build("ViTModel")[0].config)
    testreg.patch(mine, DYNAMIC)
    with pytest.raises(UnsupportedModel, match="plan"):
        testreg.save(mine, tmp_path / "clean")
    assert not list(tmp_path.iterdir())


def test_a_directory_in_use_is_left_alone(saved: Path, tmp_path: Path) -> None:
    model, _ = patched(plan=DYNAMIC)
    before = contents(saved)
    with pytest.raises(BadCheckpoint, match="--replace"):
        testreg.save(model, saved)
    assert contents(saved) == before
    testreg.save(model, saved, replace=True)
    assert testreg.active(testreg.load(saved)).plan == DYNAMIC
    testreg.save(patched()[0], saved, force=True)  # as version 0.1 calls it
    assert testreg.active(testreg.load(saved)).plan != DYNAMIC
    (tmp_path / "empty").mkdir()
    testreg.save(model, tmp_path / "empty")
    testreg.load(tmp_path / "empty")


@pytest.mark.parametrize("stranger", ["photo.jpg", "train.py", "notes.md", "boxes.json", ".git", "subfolder"])
def test_replace_takes_nothing_but_a_checkpoint(stranger: str, saved: Path) -> None:
    if "." in stranger[1:]:
        (saved / stranger).write_text("precious")
    else:
        (saved / stranger).mkdir()
    before = sorted(path.name for path in saved.iterdir())
    with pytest.raises(BadCheckpoint, match=stranger):
        testreg.save(patched()[0], saved, replace=True)
    assert sorted(path.name for path in saved.iterdir()) == before


@pytest.mark.parametrize("config", [None, "precious", '{"theme": "dark"}'])
def test_replace_takes_no_directory_without_a_models_config(config: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("precious")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    before = contents(tmp_path)
    with pytest.raises(BadCheckpoint, match="config of a model"):
        testreg.save(patched()[0], tmp_path, replace=True)
    assert contents(tmp_path) == before


def test_the_models_own_checkpoint_is_never_replaced(saved: Path) -> None:
    model, before = testreg.load(saved), contents(saved)
    (saved.parent / "link").symlink_to(saved)
    for directory in (saved, saved.parent / "link", saved / ".." / "clean"):
        with pytest.raises(BadCheckpoint, match="loaded from"):
            testreg.save(model, directory, replace=True)
    assert contents(saved) == before


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(BadCheckpoint, match="is a file"):
        testreg.save(patched()[0], tmp_path / "file", replace=True)
    with pytest.raises(BadCheckpoint, match="could not be written"):
        testreg.save(patched()[0], tmp_path / "file" / "clean")
    assert (tmp_path / "file").read_text() == "precious"


# Killed at any moment


@pytest.mark.parametrize("syncs", [0, 3, 9])
def test_a_full_disk_leaves_the_old_checkpoint(syncs: int, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, fsync, calls = contents(saved), os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > syncs:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(BadCheckpoint, match=r"No space left .* untouched"):
        testreg.save(patched(plan=DYNAMIC)[0], saved, replace=True)
    with pytest.raises(BadCheckpoint, match="No space left"):
        testreg.save(patched(plan=DYNAMIC)[0], saved.parent / "new")
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["clean"]


def test_a_limit_on_file_sizes_leaves_the_old_checkpoint(saved: Path) -> None:
    """The real thing: the system refuses to write the weights, somewhere inside safetensors."""
    resource = pytest.importorskip("resource")
    import signal

    model, before = patched(plan=DYNAMIC)[0], contents(saved)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(BadCheckpoint, match="untouched"):
            testreg.save(model, saved, replace=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["clean"]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch, testreg
from testreg import RegisterPlan
from testreg.checkpoints import atomic, saving as checkpoint
from testreg.runtime.recipe import Recipe, sha256
torch.set_num_threads(1)
from zoo import build
root = Path(sys.argv[1])

def save(target, registers, **kwargs):
    model, _ = build("ViTModel")
    testreg.patch(model, RegisterPlan({0: (1,)}, registers=registers))
    testreg.save(model, target, **kwargs)

def at(moment, target):
    # In a child process: save, and die at the given call of a function that touches the disk.
    child = os.fork()
    if child == 0:
        seen = 0
        def deadly(function):
            def call(*args, **kwargs):
                nonlocal seen
                seen += 1
                if seen == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return call
        for owner, names in ((os, ("fsync", "rename")), (atomic, ("_exchange",)), (atomic.shutil, ("rmtree",)),
                             (checkpoint, ("card",))):
            for name in names:
                setattr(owner, name, deadly(getattr(owner, name)))
        save(target, 2, replace=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status)

for fresh in (False, True):
    moment, found = 0, []
    while True:
        moment += 1
        target = root / f"{fresh}-{moment}" / "clean"
        if not fresh:
            save(target, 1)
        killed = at(moment, target)
        if target.exists():
            Recipe.read(target).verify(target)
            found.append(RegisterPlan.load(target / "registers.safetensors").registers)
        else:
            assert fresh
            found.append(0)
        save(target, 3, replace=True)  # works, and clears what the killed process left
        assert [path.name for path in target.parent.iterdir()] == ["clean"], list(target.parent.iterdir())
        if not killed:
            break
    old = 0 if fresh else 1
    assert set(found) == {old, 2}, found
    assert found == sorted(found), found  # the old one up to some moment, the new one from then on
    print(len(found), "moments: ok")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork to kill a copy of the process")
def test_killed_at_any_moment_the_directory_holds_the_old_checkpoint_or_the_new_one(forked, tmp_path: Path) -> None:
    _, output, errors = forked.run(tmp_path, KILLED, tmp_path)
    assert output.count("moments: ok") == 2, errors[-3000:]


def test_without_an_exchange_of_names_two_renames_do(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    testreg.save(patched(plan=DYNAMIC)[0], saved, replace=True)
    assert testreg.active(testreg.load(saved)).plan == DYNAMIC
    assert [path.name for path in saved.parent.iterdir()] == ["clean"]

    rename, before = os.rename, contents(saved)
    for dies in (True, False):  # between the two renames, or the second is refused

        def second_fails(one: Path, other: Path, dies: bool = dies) -> None:
            if other == saved and (dies or not one.name.endswith(atomic.OLD)):
                raise KeyboardInterrupt if dies else OSError(errno.EACCES, os.strerror(errno.EACCES))
            rename(one, other)

        monkeypatch.setattr(atomic.os, "rename", second_fails)
        with pytest.raises(KeyboardInterrupt if dies else BadCheckpoint):
            testreg.save(patched()[0], saved, replace=True)
        if dies:
            (old,) = saved.parent.iterdir()
            with pytest.raises(KeyboardInterrupt):
                testreg.save(patched()[0], saved)
            assert contents(old) == before  # the only copy is not cleared away
            rename(old, saved)
        assert contents(saved) == before
        assert [path.name for path in saved.parent.iterdir()] == ["clean"]


def test_whoever_may_read_the_directory_may_read_its_files(saved: Path) -> None:
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {saved.stat().st_mode & 0o666}


def test_two_at_once_do_not_clear_each_other_away(tmp_path: Path) -> None:
    with atomic.replacing(tmp_path / "clean") as one:
        (one / "file").write_text("one")
        with atomic.replacing(tmp_path / "clean") as two:
            (two / "file").write_text("two")
        assert (tmp_path / "clean" / "file").read_text() == "two"
    assert (tmp_path / "clean" / "file").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["clean"]
