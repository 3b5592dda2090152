"""Processes forked from a server that has torch and outlast loaded: each begins where a new interpreter would only be
after seconds of imports."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
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
    "torch._dynamo",
    "torch.nn.parallel",
    "outlast.cli",
    "outlast.launch",
    "outlast.trainer.main",
    "tests.comm.ranks",
    "tests.checkpoint.ranks",
    "tests.checkpoint.sharded_training",
    "tests.checkpoint.sharded_parts",
]


def context() -> ForkServerContext:
    """Where processes come from. There is one server for all tests, and it loads all this before the first fork."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(LOADED)
    return made


class Job:
    """``python -m MODULE WORDS`` without the start of an interpreter: ``MODULE.main()`` in a process of its own.

    Arguments, environment, outputs, signals and the exit status are those of a command.

    Args:
        module: a module with a ``main()`` that returns the exit status, or None.
        words: the arguments.
        env: the whole environment.
        stdout: the file that its output is added to.
        stderr: the same for errors, may be the same file.
        cwd: where it runs.
    """

    def __init__(
        self,
        module: str,
        words: Sequence[str],
        *,
        env: Mapping[str, str],
        stdout: Path,
        stderr: Path,
        cwd: Path | None = None,
    ) -> None:
        self.args = [module, *words]
        told = (module, list(words), dict(env), str(cwd or Path.cwd()), (str(stdout), str(stderr)))
        self._process = context().Process(target=_become, args=told)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, -N where signal N ended it; raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self._process.exitcode


def run_main(
    module: str, words: Sequence[str], *, env: Mapping[str, str], timeout_s: float, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """A :class:`Job` to its end; raises subprocess.TimeoutExpired, and ends it then."""
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        job = Job(module, words, env=env, stdout=stdout, stderr=stderr, cwd=cwd)
        try:
            status = job.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            job.kill()
            job.wait()
            raise subprocess.TimeoutExpired(job.args, timeout_s, stdout.read_bytes(), stderr.read_bytes()) from error
        said = [path.read_text(errors="replace") for path in (stdout, stderr)]
        return subprocess.CompletedProcess(job.args, status, *said)


def _become(module: str, words: list[str], env: dict[str, str], cwd: str, outputs: tuple[str, str]) -> None:
    for descriptor, path in enumerate(outputs, 1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    # A suite that runs in a shell's background inherits that SIGINT is ignored; a command at a terminal does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
