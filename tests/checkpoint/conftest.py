"""What several tests of checkpoints start once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.checkpoint.s3 import Server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    """An S3 server that nobody kills; choose a prefix of one's own."""
    server = Server()
    server.start()
    yield server
    server.kill()
