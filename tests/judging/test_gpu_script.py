"""The script of the GPU's numbers, run dry on the processor: every job, cut off and gone on with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.benchmarks import gpu, speed

DRY = ("--device", "cpu", "--quick", "--seconds", "0.01")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """What a run that is cut off after two jobs leaves, and then the rest."""
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    saved, shape = [], speed.SHAPES["Ti"]
    speed.SHAPES["Ti"] = (192, 4, 3)

    def cut(done, out):
        save(done, out)
        saved.append(len(done["jobs"]))
        if len(saved) == 2:
            raise KeyboardInterrupt

    save, gpu.save = gpu.save, cut
    try:
        with pytest.raises(KeyboardInterrupt):
            gpu.main([*DRY, "--out", str(file)])
        assert len(json.loads(file.read_text())["jobs"]) == 2
        gpu.main([*DRY, "--out", str(file)])
    finally:
        gpu.save, speed.SHAPES["Ti"] = save, shape
    assert saved[:3] == [1, 2, 3]  # the first two were not run again
    return file


def test_every_job_runs_or_says_why_not(out):
    done = json.loads(out.read_text())
    wanted = [name for name, _ in gpu.jobs("cpu", True, 1)]
    assert list(done["jobs"]) == wanted
    failed = {name: rows[0]["reason"] for name, rows in done["jobs"].items() if "reason" in rows[0]}
    assert all(name.endswith("flash") or name in ("int8", "onnx") for name in failed), failed
    rows = done["jobs"]["forward Ti 56 bfloat16 sdpa"]
    assert [row["arm"] for row in rows] == [
        "unpatched",
        "unpatched again",
        "dynamic",
        "constant",
        "attention",
        "native",
    ]
    assert rows[0]["over unpatched"].startswith("1.000")
    assert all(row["ms"] > 0 for row in rows)
    assert {row["arm"] for row in done["jobs"]["find"]} == {"plain pass", "find"}


def test_all_sizes_kernels_and_types_are_asked_for_on_a_gpu():
    names = [name for name, _ in gpu.jobs("cuda", False, 1)]
    for shape, side, dtype, kernel in gpu.product("BL", (224, 518), ("bfloat16", "float16"), ("sdpa", "flash")):
        assert f"forward {shape} {side} {dtype} {kernel}" in names
    assert {f"graphs {shape} {side}" for shape, side in gpu.product("BL", (224, 518))} <= set(names)
    assert {"find", "int8", "onnx"} <= set(names)


def test_its_rows_are_a_table(out, capsys):
    gpu.main(["--table", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert "cores" in lines[0]
    assert lines[2].startswith(
        "| model | how | unpatched, ms | unpatched again | dynamic | constant | attention | native |"
    )
    rows = json.loads(out.read_text())["jobs"]["forward Ti 56 bfloat16 sdpa"]
    cells = next(line for line in lines if line.startswith(f"| {rows[0]['what']} | {rows[0]['how']} |")).split(" | ")
    assert cells[3:8] == [row["over unpatched"] for row in rows[1:]]


def test_without_a_gpu_it_says_that_it_was_not_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    gpu.main(["--out", str(tmp_path / "gpu.json")])
    assert "not run, since this machine has no CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()


def test_the_jobs_that_the_docs_call_not_run_are_asked_for_by_their_commands():
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| ([^|]*) \| `python -m tests.benchmarks.gpu --only \"(.+?)\"` \|\n", page.split("## CUDA")[1])
    names = [name for name, _ in gpu.jobs("cuda", False, 1)]
    asked = {what: [name for name in names if re.search(only, name)] for what, only in rows}
    assert list(map(len, asked.values())) == [1, 1, 4, 4]
    for what, found in asked.items():
        assert all(
            word in what for name in found for word in name.split() if word in ("find", "int8", "float16", "flash")
        )


def test_only_some_jobs(tmp_path, capsys):
    gpu.main([*DRY, "--out", str(tmp_path / "gpu.json"), "--minutes", "-1", "--only", "^find$|int8"])
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["find", "int8"]


def test_no_job_is_begun_after_the_minutes(tmp_path, capsys):
    gpu.main([*DRY, "--out", str(tmp_path / "gpu.json"), "--minutes", "-1"])
    assert "not begun" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()
