"""A node that is about to be accused of being slow tries out itself first, and another one for comparison.

Node 0 asks for it in its message to the others, and hears of it in theirs. It runs in a thread of the node's launcher,
beside the ranks; at most half of the nodes are asked at a time, and a node at most once in ten minutes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from outlast.diagnostics.probes.judge import described, wrong_with
from outlast.diagnostics.probes.node_test import NodeTest, self_test

AGAIN_S = 600.0
"""For so long, what came of a node's test holds."""
ANSWER_S = 10.0
"""A node that has not answered after this is not waited for."""
PART_S = 2.0
"""Limit of each part of a test."""

log = logging.getLogger("outlast.launch")


class NodeTrials:
    """One node's part, in one round of the rendezvous; on node 0 also who is asked, and what came of it.

    Args:
        node: this node's number.
        nodes: how many there are.
        folder: the disk that is tried out.
        test: what is done; given the folder and the limit of each part in seconds.
    """

    def __init__(
        self, node: int, nodes: int, folder: Path, test: Callable[[Path, float], NodeTest] = self_test
    ) -> None:
        self._node, self._nodes, self._folder, self._test = node, nodes, folder, test
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._tested: dict[str, Any] | None = None
        self._number = 0
        self._pending: dict[int, float] = {}
        """Of nodes that are asked now, when."""
        self._known: dict[int, tuple[float, NodeTest | None]] = {}
        """By node, when it answered, and what; None if it did not."""

    @property
    def asked(self) -> tuple[int, ...]:
        """On node 0: the number of the newest question, and whom it goes to."""
        return (self._number, *sorted(self._pending))

    @property
    def tested(self) -> Mapping[str, Any] | None:
        """What came of this node's newest test, as it is told to node 0."""
        with self._lock:
            return self._tested

    def take_part(self, asked: Sequence[int]) -> None:
        """Try out this node if it is asked, and has not done so for this question. Nothing waits for it."""
        number, nodes = (asked[0], asked[1:]) if asked else (0, ())
        if self._node not in nodes or number <= self._number_done or (self._thread and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._run, args=(number,), name="outlast-trial", daemon=True)
        self._thread.start()

    def hear(self, node: int, told: Mapping[str, Any] | None) -> None:
        """On node 0: what a node told of its newest test."""
        if told is None or node not in self._pending or told.get("asked") != self._number:
            return
        try:
            test: NodeTest | None = NodeTest.from_json(told["test"])
        except (KeyError, TypeError, ValueError, AttributeError):
            test = None
        del self._pending[node]
        self._known[node] = time.monotonic(), test

    def prepare(self, node: int) -> None:
        """On node 0: a node may be accused soon; the one that it will be compared with tries out itself already.

        That one is not suspected, so that what it loses by this speaks for nobody's guilt.
        """
        self._are_known(self._peers(node))

    def outcome(self, node: int, names: Sequence[str]) -> str | None:
        """On node 0: what came of a node's test, in words; None until that is known, which is soon.

        Args:
            node: that is about to be accused.
            names: of all nodes.
        """
        peers = self._peers(node)
        return self._words(node, *peers, names=names) if self._are_known([node, *peers]) else None

    def _peers(self, node: int) -> list[int]:
        return [one for one in range(self._nodes) if one != node][:1]

    def _are_known(self, wanted: Sequence[int]) -> bool:
        """Whether these have answered, or never will; asks those that have not been asked."""
        now_s = time.monotonic()
        self.hear(self._node, self.tested)
        for one in [one for one, at_s in self._pending.items() if now_s - at_s > ANSWER_S]:
            del self._pending[one]
            self._known[one] = now_s, None
        missing = [one for one in wanted if one not in self._known or now_s - self._known[one][0] > AGAIN_S]
        if missing and not self._pending:
            self._number += 1
            self._pending = dict.fromkeys(missing[: max(1, self._nodes // 2)], now_s)
            self.take_part(self.asked)
        return not missing

    def close(self, wait_s: float = 1.0) -> None:
        """The ranks have ended; what runs is waited for so long."""
        if self._thread is not None:
            self._thread.join(wait_s)

    @property
    def _number_done(self) -> int:
        tested = self.tested
        return int(tested["asked"]) if tested is not None else 0

    def _run(self, number: int) -> None:
        try:
            test = self._test(self._folder, PART_S)
        except Exception as error:  # it must not end with a question that is asked for ever
            log.warning("outlast: this node could not try out itself: %s: %s", type(error).__name__, error)
            test = NodeTest(reasons=(f"it could not try out itself: {type(error).__name__}",))
        with self._lock:
            self._tested = {"asked": number, "test": test.as_json()}

    def _words(self, node: int, *peers: int, names: Sequence[str]) -> str:
        test = self._known[node][1]
        tests = {one: known for one in peers if (known := self._known[one][1]) is not None}
        if test is None:
            return f"node {names[node]} did not answer within {ANSWER_S:g} s when it was asked to try out itself"
        found = wrong_with(test, list(tests.values()))
        if found:
            return f"node {names[node]}: {'; '.join(found)}"
        beside = "".join(f"; node {names[one]} {described(each)}" for one, each in tests.items())
        return f"node {names[node]} is as it should be: it {described(test)}{beside}"
