"""What every launcher under test leaves is cleared away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from outlast.diagnostics.live import clear, shm_directory
from tests.launch.jobs import STARTED


@pytest.fixture(autouse=True)
def _end_launchers(tmp_path: Path) -> Iterator[None]:
    """A test that fails leaves no launcher behind, and none leaves shared memory."""
    yield
    while STARTED:
        job = STARTED.pop()
        job.kill()
        job.wait()
    clear(shm_directory(tmp_path / "run"))
