"""What several tests of checkpoints share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.namespace import memories
from outlast.checkpoint.save.snapshot import Snapshot
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


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Lazy copies do not begin before this is set."""
    opened = threading.Event()
    copy = Snapshot.copy

    def late(snapshot: Snapshot, index: int, target: torch.Tensor, **more: Any) -> int:
        part = snapshot._parts[index]
        assert part is not None
        assert part.eager or opened.wait(60)
        return copy(snapshot, index, target, **more)

    monkeypatch.setattr(Snapshot, "copy", late)
    yield opened
    opened.set()
