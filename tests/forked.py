"""Processes forked from a server that has torch and outlast loaded: each begins where a new interpreter would only be
after seconds of imports."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing.context import ForkServerContext
from pathlib import Path

LOADED = [
    "pytest",
    "torch.distributed.run",
    "torch.nn.parallel",
    "outlast.cli",
    "outlast.launch",
    "outlast.trainer.main",
    "tests.comm.ranks",
    "tests.checkpoint.ranks",
]


def context() -> ForkServerContext:
    """Where processes come from. There is one server for all tests, and it loads all this before the first fork."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(LOADED)
    return made


def run_main(
    module: str, words: Sequence[str], env: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """``python -m MODULE WORDS``, without the start of an interpreter: ``MODULE.main()`` in a process of its own.

    Arguments, environment, both outputs and the exit status are those of a command.
    """
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        told = (module, list(words), dict(env), os.getcwd(), [str(path) for path in outputs])
        process = context().Process(target=_become, args=told)
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([module, *words], timeout_s, *[path.read_bytes() for path in outputs])
        said = [path.read_text(errors="replace") for path in outputs]
        return subprocess.CompletedProcess([module, *words], process.exitcode, *said)


def _become(module: str, words: list[str], env: dict[str, str], cwd: str, outputs: list[str]) -> None:
    for descriptor, path in enumerate(outputs, 1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    found = import_module(module)
    sys.argv[:] = [str(found.__file__), *words]
    main: Callable[[], int | None] = found.main
    try:
        sys.exit(main())
    finally:
        atexit._run_exitfuncs()  # which an interpreter runs in the end, and a forked process does not
