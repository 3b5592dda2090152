"""Before a node is accused of being slow it tries out itself, and another one for comparison, one after the other."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from outlast.diagnostics.monitor.reports import NodeReport, decode
from outlast.diagnostics.probes.node_test import NodeTest
from outlast.launch import node_trials
from outlast.launch.node_trials import NodeTrials
from tests.helpers import wait_for

GOOD = NodeTest(compute_flops=40e9, memory_bytes_s=8e9, disk_bytes_s=50e6)
WEAK = NodeTest(compute_flops=9e9, memory_bytes_s=8e9, disk_bytes_s=50e6)
WRONG = NodeTest(compute_flops=40e9, reasons=("memory: the copy differs",))


class Nodes:
    """Launchers of several nodes, and the messages between them."""

    def __init__(self, folder: Path, tests: list[NodeTest]) -> None:
        self.running = 0
        self.most = 0
        self._lock = threading.Lock()
        self.names = [f"n{node}" for node in range(len(tests))]
        self.tested: list[int] = []
        self.all = [self._one(node, folder, tests) for node in range(len(tests))]

    def _one(self, node: int, folder: Path, tests: list[NodeTest]) -> NodeTrials:
        def test(where: Path, limit_s: float) -> NodeTest:
            assert (where, limit_s) == (folder, node_trials.PART_S)
            with self._lock:
                self.tested.append(node)
                self.running += 1
                self.most = max(self.most, self.running)
            try:
                return tests[node]
            finally:
                with self._lock:
                    self.running -= 1

        return NodeTrials(node, len(tests), folder, test)

    def exchange(self, *silent: int) -> None:
        """Each node tells once."""
        for node, one in enumerate(self.all):
            if node in silent:
                continue
            asked = decode(NodeReport(node=0, host="a", seq=1, t=0.0, asked=self.all[0].asked).encode()).asked
            if node:
                one.take_part(asked)
            one.close(20.0)
            told = NodeReport(node=node, host="a", seq=1, t=0.0, tested=one.tested)
            self.all[0].hear(node, decode(told.encode()).tested)

    def outcome(self, node: int, *silent: int) -> str:
        def look() -> str | None:
            self.exchange(*silent)
            return self.all[0].outcome(node, self.names)

        return str(wait_for(look))


def test_a_node_that_is_as_fast_as_another_one_is_as_it_should_be(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, [GOOD] * 4)
    assert nodes.all[0].outcome(2, nodes.names) is None
    words = nodes.outcome(2)
    assert words.startswith("node n2 is as it should be: it computes at 40 GFLOP/s, copies memory at 8")
    assert "; node n0 computes at 40 GFLOP/s" in words
    assert sorted(nodes.tested) == [0, 2], "and no other one"
    assert nodes.outcome(2) == words
    assert len(nodes.tested) == 2, "it holds for a while"


def test_of_two_nodes_one_is_asked_after_the_other(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, [GOOD, WEAK])
    assert nodes.outcome(1) == "node n1: computes at 9 GFLOP/s, its peers at 40 GFLOP/s in the median"
    assert nodes.tested == [1, 0]
    assert nodes.most == 1
    assert nodes.outcome(0).startswith("node n0 is as it should be")
    assert len(nodes.tested) == 2


def test_the_one_to_compare_with_may_be_tried_out_before(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, [GOOD, WEAK])
    nodes.all[0].prepare(1)
    nodes.exchange()
    assert nodes.tested == [0], "and not the one that is suspected"
    assert nodes.outcome(1).startswith("node n1: computes at 9 GFLOP/s")
    assert nodes.tested == [0, 1]


def test_one_that_computes_wrong_or_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Nodes(tmp_path, [WRONG])
    assert alone.outcome(0) == "node n0: memory: the copy differs"
    monkeypatch.setattr(node_trials, "ANSWER_S", 0.2)
    nodes = Nodes(tmp_path, [GOOD] * 3)
    assert nodes.outcome(2, 2) == "node n2 did not answer within 0.2 s when it was asked to try out itself"


def test_a_test_that_fails_is_an_answer(tmp_path: Path) -> None:
    def broken(folder: Path, limit_s: float) -> NodeTest:
        raise RuntimeError("no numbers")

    one = NodeTrials(0, 1, tmp_path, broken)
    assert wait_for(lambda: one.outcome(0, ["a"])) == "node a: it could not try out itself: RuntimeError"


def test_the_real_one_measures_this_node(tmp_path: Path) -> None:
    one = NodeTrials(0, 1, tmp_path)
    words = str(wait_for(lambda: one.outcome(0, ["a"]), timeout_s=60))
    assert words.startswith("node a is as it should be: it computes at "), words
    assert list(tmp_path.iterdir()) == []
