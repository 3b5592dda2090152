"""What several tests of checkpoints share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.namespace import memories
from tests.checkpoint.s3 import Server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    """An S3 server that nobody kills; choose a prefix of one's own."""
    server = Server()
    server.start()
    yield server
    server.kill()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[str]]:
    """Two nodes' memory, which ranks see at /dev/shm. Needs root."""
    with memories(tmp_path, 2) as folders:
        yield list(map(str, folders))
