"""What several tests of checkpoints share."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

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
    """Two nodes' memory: file systems of their own, which ranks see at /dev/shm. Needs root."""
    folders = [str(tmp_path / name) for name in ("node0", "node1")]
    for folder in folders:
        Path(folder).mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "outlast-test", folder], check=True)
    yield folders
    for folder in folders:
        subprocess.run(["umount", folder], check=True)
