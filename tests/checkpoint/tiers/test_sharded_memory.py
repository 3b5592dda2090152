"""DTensors in the nodes' memory: a node that lost its memory is sent only what its ranks' parts need."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from tests.checkpoint.sharded import run
from tests.checkpoint.sharded_parts import SHAPES, back_from_memory, saved_to_memory

pytestmark = pytest.mark.root
WHOLE_BYTES = sum(4 * math.prod(shape) for shape in SHAPES.values())
RANKS = 4


def lose(node: str) -> None:
    for path in Path(node).iterdir():
        shutil.rmtree(path)


@pytest.mark.parametrize("whole", [False, True], ids=["saved sharded", "saved whole"])
def test_a_lost_node_is_sent_its_parts(tmp_path: Path, nodes: list[str], whole: bool) -> None:
    url = str(tmp_path / "checkpoints")
    run(RANKS, saved_to_memory, url, nodes, whole)
    lose(nodes[1])
    found = run(RANKS, back_from_memory, url, nodes, True)
    assert [one["right"] for one in found] == [True] * RANKS
    assert not any("storage" in one["tiers"] for one in found)
    for one in found[:2]:
        assert one["sent_bytes"] == 0, "its node has all of it"
    # Besides its part: documents, checksums, and what chunks have beyond the part's ends. Of what was saved whole,
    # chunks are rows, so that a part of columns takes all.
    more_bytes = 4 * math.prod(SHAPES["columns"]) if whole else 0
    for one in found[2:]:
        assert one["own_bytes"] < one["sent_bytes"] < 1.2 * one["own_bytes"] + more_bytes + 2 * 4000
        assert one["sent_bytes"] < 0.7 * WHOLE_BYTES
        assert "partner" in one["tiers"]


def test_without_like_it_is_sent_all(tmp_path: Path, nodes: list[str]) -> None:
    url = str(tmp_path / "checkpoints")
    run(RANKS, saved_to_memory, url, nodes, False)
    lose(nodes[0])
    found = run(RANKS, back_from_memory, url, nodes, False)
    assert [one["right"] for one in found] == [True] * RANKS
    assert all(one["sent_bytes"] > WHOLE_BYTES for one in found[:2])
