"""Storage is read once, however many ranks need what lies there."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.checkpoint.state.shares import share_out
from tests.checkpoint.damage import flip
from tests.checkpoint.helpers import save_by_ranks
from tests.checkpoint.ranks import Orders, run


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 7))
def test_shares_are_equal_but_for_one_size(sizes: list[int], shares: int) -> None:
    owners = share_out(sizes, shares)
    assert owners == sorted(owners)
    assert set(owners) <= set(range(shares))
    for share in range(shares):
        mine = sum(size for size, owner in zip(sizes, owners, strict=True) if owner == share)
        assert mine <= math.ceil(sum(sizes) / shares) + max(sizes, default=0)


@pytest.mark.root
def test_two_nodes_read_replicated_files_once(tmp_path: Path, nodes: list[str]) -> None:
    url, reads = tmp_path / "checkpoints", tmp_path / "reads"
    save_by_ranks(url, 1, world_size=2)
    order = Orders((str(url),), "two", restore=True, reads=str(reads))
    outcomes = run(*[replace(order, shm=node) for node in nodes])
    assert [one.restored for one in outcomes] == [[1], [1]]
    counts = Counter(reads.read_text().split())
    replicated = {path: count for path, count in counts.items() if "/model/" in path or "/optimizer/" in path}
    assert len(replicated) > 5
    assert set(replicated.values()) == {1}


@pytest.mark.root
def test_damage_is_found_all_the_same(tmp_path: Path, nodes: list[str]) -> None:
    url = tmp_path / "checkpoints"
    save_by_ranks(url, 1, 2, world_size=2)
    flip(url / "step_00000002" / "model" / "blocks.0.attn.qkv.weight" / "c.0.0")
    outcomes = run(*[replace(Orders((str(url),), "two", restore=True), shm=node) for node in nodes])
    assert [one.restored for one in outcomes] == [[1], [1]]
    (rejected,) = [event for event in outcomes[0].events if event["kind"] == "checkpoint_rejected"]
    assert rejected["file"] == "model/blocks.0.attn.qkv.weight/c.0.0"
