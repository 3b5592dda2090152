from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.comm.ranks import Ranks


@pytest.fixture(scope="package")
def three_ranks() -> Iterator[Ranks]:
    """Three processes in one gloo group, shared by all tests that leave it whole."""
    ranks = Ranks(3)
    yield ranks
    ranks.close()
