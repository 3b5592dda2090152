"""Rates of all links, and what nodes can do: which link, or which node."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from outlast.diagnostics.probes.judge import ProbeFinding, ProbeReport, judge
from outlast.diagnostics.probes.link import LinkSeen
from outlast.diagnostics.probes.node_test import NodeTest
from outlast.diagnostics.probes.pairs import rounds

GOOD = NodeTest(compute_flops=5e10, memory_bytes_s=1e10, disk_bytes_s=3e8)
FAST = 1e9


def reports(nodes: int, slow: dict[tuple[int, int], float] | None = None) -> dict[int, ProbeReport]:
    """What nodes have seen whose links have 1 GB/s with 10 % of noise, but for some, given as (from, to)."""
    random = np.random.default_rng(nodes)
    pairs = [pair for one in rounds(nodes) for pair in one]
    found = {}
    for node in range(nodes):
        peers = [a + b - node for a, b in pairs if node in (a, b)]
        rates = {peer: (slow or {}).get((peer, node), FAST * random.uniform(0.9, 1.1)) for peer in peers}
        links = {
            peer: LinkSeen(received_bytes_s=rate) if rate else LinkSeen(reason="timed out")
            for peer, rate in rates.items()
        }
        found[node] = ProbeReport(links=links, test=GOOD)
    return found


def names(nodes: int) -> list[str]:
    return [f"n{one}" for one in range(nodes)]


def both(node: int, nodes: int, rate: float) -> dict[tuple[int, int], float]:
    return {pair: rate for other in range(nodes) if other != node for pair in ((node, other), (other, node))}


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 8, 64, 300])
def test_where_all_is_well_nothing_is_said(nodes: int) -> None:
    assert judge(reports(nodes), names(nodes)) == ()


@pytest.mark.parametrize("nodes", [3, 4, 5, 8, 64])
@pytest.mark.parametrize("rate", [0.0, 1e8, 4e8])
def test_an_adapter_is_its_nodes(nodes: int, rate: float) -> None:
    (found,) = judge(reports(nodes, both(1, nodes, rate)), names(nodes))
    assert str(found).startswith("node n1: ")
    assert ("timed out" if rate == 0 else f"{rate / 1e6:.0f} MB/s from ") in found.words


def test_one_direction_of_an_adapter_is_its_nodes_too() -> None:
    slow = {pair: 1e8 for pair in both(3, 8, 1e8) if pair[0] == 3}
    (found,) = judge(reports(8, slow), names(8))
    assert str(found.culprit) == "node n3"


@pytest.mark.parametrize("rate", [0.0, 1e8])
def test_a_link_is_between_two(rate: float) -> None:
    first, second = rounds(8)[1][2]
    (found,) = judge(reports(8, {(first, second): rate, (second, first): rate}), names(8))
    assert str(found.culprit) == f"the link from n{first} to n{second}"


def test_between_two_nodes_slow_is_what_is_slower_than_was_asked_for() -> None:
    slow = both(1, 2, 1e8)
    assert judge(reports(2, slow), names(2)) == ()
    (found,) = judge(reports(2, slow), names(2), least_bytes_s=5e8)
    assert str(found.culprit) == "the link from n0 to n1"
    (found,) = judge(reports(2, both(1, 2, 0.0)), names(2))
    assert "no probe from n0 to n1: timed out" in found.words


def test_what_is_slow_everywhere_is_the_network() -> None:
    slow = {(a, b): 1e8 for a in range(6) for b in range(6)}
    assert judge(reports(6, slow), names(6)) == ()
    (found,) = judge(reports(6, slow), names(6), least_bytes_s=5e8)
    assert str(found).startswith("the network: 100 MB/s from ")


def test_a_node_that_is_not_heard_is_named_and_its_links_are_not() -> None:
    seen = reports(4, both(2, 4, 0.0))
    del seen[2]
    assert [str(one) for one in judge(seen, names(4))] == ["node n2: it took no part in the probe"]


@pytest.mark.parametrize(
    ("test", "said"),
    [
        (replace(GOOD, compute_flops=2e10), "computes at 20 GFLOP/s, its peers at 50 GFLOP/s in the median"),
        (replace(GOOD, memory_bytes_s=1e9), "copies memory at 1 GB/s"),
        (replace(GOOD, disk_bytes_s=3e6), "writes its disk at 3 MB/s"),
        (NodeTest(reasons=("disk: no answer within 5 s",)), "disk: no answer within 5 s"),
    ],
)
def test_a_node_that_is_slow_or_wrong(test: NodeTest, said: str) -> None:
    seen = reports(4)
    seen[3] = replace(seen[3], test=test)
    found = judge(seen, names(4))
    assert [str(one.culprit) for one in found] == ["node n3"]
    assert said in found[0].words


def test_a_node_that_hears_hardly_anybody_accuses_nobody() -> None:
    seen = reports(4, both(3, 4, 0.0))
    (found,) = judge({3: seen[3]}, names(4))
    assert str(found) == "the network: 1 of 4 nodes were heard here (n3): too few to tell whose fault it is"


def test_findings_are_texts() -> None:
    assert str(ProbeFinding(culprit=None, words="slow")) == "the network: slow"
