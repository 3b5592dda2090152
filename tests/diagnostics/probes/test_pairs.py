"""Everybody has one partner at a time, and nobody the same one twice."""

from __future__ import annotations

from collections import Counter

import pytest

from outlast.diagnostics.probes.pairs import MOST_ROUNDS, rounds


@pytest.mark.parametrize("nodes", [0, 1, 2, 3, 4, 5, 6, 7, 16, 33, 1024])
def test_pairs_are_disjoint_and_their_number_of_rounds_is_bounded(nodes: int) -> None:
    found = rounds(nodes)
    assert len(found) <= MOST_ROUNDS + 1
    for pairs in found:
        assert all(0 <= a < b < nodes for a, b in pairs)
        assert max(Counter(node for pair in pairs for node in pair).values()) == 1
        assert len(pairs) == nodes // 2
    every = [pair for pairs in found for pair in pairs]
    assert len(set(every)) == len(every)
    met = Counter(node for pair in every for node in pair)
    assert all(met[node] >= min(nodes - 1, MOST_ROUNDS) for node in range(nodes) if nodes > 1)
    if nodes <= 5:
        assert len(every) == nodes * max(nodes - 1, 0) // 2
