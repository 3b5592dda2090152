from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outlast.diagnostics.live import (
    clear,
    shm_directory,
)

Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def shm(tmp_path: Path) -> Iterator[Path]:
    """The shared memory folder of a run at ``tmp_path``, emptied afterwards."""
    folder = shm_directory(tmp_path)
    yield folder
    clear(folder)


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start a Python program in a process of its own; whatever is left of it at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(program: str, *arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(timeout=30)
        assert process.stdout is not None
        process.stdout.close()
