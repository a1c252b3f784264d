"""Scripts in processes of their own that need not import torch again: forks of a process that has.

Each runs in a fork of Python's fork server, which imports `libraries` once for all tests of a worker, and never
testreg: a script may do without it, or import it as for the first time. What a process does until the libraries are
imported is for `subprocess` to test.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT: Any = get_context("forkserver")
MODULE = "import runpy\nrunpy.run_module({name!r}, run_name='__main__', alter_sys=True)"  # a script: `python -m NAME`


def serve(folder: Path) -> None:
    """Start the server; what it forks keeps the code of checkpoints in `folder`, and asks nothing of the network."""
    CONTEXT.set_forkserver_preload(["libraries"])
    before = dict(os.environ)
    os.environ |= {"HF_MODULES_CACHE": str(folder), "HF_HUB_OFFLINE": "1"}  # read when the libraries are imported
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where `libraries` lies
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass
class Script:
    """A script that runs.

    Attributes:
        process: the process it runs in.
        out, err: the files that take what it prints.
    """

    process: BaseProcess
    out: Path
    err: Path

    def wait(self, timeout: float = 300) -> tuple[int | None, str, str]:
        """Its exit code, negative after a signal, and what it printed on stdout and on stderr."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"the script runs after {timeout} s; it printed {self.err.read_text()[-3000:]!r}")
        return self.process.exitcode, self.out.read_text(), self.err.read_text()


def start(folder: Path, code: str, *arguments: Any) -> Script:
    """Run `code` in `folder` as `python -c` does, with `sys.argv[1:]` of `arguments`.

    What it prints goes to files beside the folder, `NAME.out` and `NAME.err`.
    """
    out, err = (folder.with_name(f"{folder.name}.{name}") for name in ("out", "err"))
    process = CONTEXT.Process(target=_run, args=(code, list(map(str, arguments)), folder, out, err))
    process.start()
    return Script(process, out, err)


def run(folder: Path, code: str, *arguments: Any) -> tuple[int | None, str, str]:
    """`start` and `wait`."""
    return start(folder, code, *arguments).wait()


def _run(code: str, arguments: list[str], folder: Path, out: Path, err: Path) -> None:
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    os.chdir(folder)
    # Code of checkpoints lies in a folder of this script's own, or scripts would see each other's half-made modules.
    modules = importlib.import_module("transformers.dynamic_module_utils")
    modules.HF_MODULES_CACHE = cache = tempfile.mkdtemp(dir=modules.HF_MODULES_CACHE)
    sys.path.insert(0, cache)  # ahead of the one that the server knows
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})
