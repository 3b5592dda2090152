"""What all nodes told, on one of them: their ranks, conditions and clocks, and who keeps the others waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from outlast.diagnostics.live import Observation, StallRules, judge
from outlast.diagnostics.live.stall import Culprit
from outlast.diagnostics.live.suspects import Suspect, find_suspects
from outlast.diagnostics.monitor.conditions import NodeCondition
from outlast.diagnostics.monitor.node_times import ClockOffset, LeastDelay, offset
from outlast.diagnostics.monitor.reports import Accused, NodeReport, at, decode

STALE_INTERVALS = 4.0
"""A node that has said nothing new for this many intervals is not known to do anything."""
MOST_ACCUSED = 8


class Collector:
    """The newest message of every node. What comes from messages is read by one thread, and used by another.

    Args:
        nodes: of the round.
        world_size: ranks of the round.
        interval_s: between two messages of a node.
    """

    def __init__(self, nodes: int, world_size: int, interval_s: float) -> None:
        self._nodes, self._world_size = nodes, world_size
        self._stale_s = STALE_INTERVALS * interval_s
        self._lock = threading.Lock()
        self._reports: dict[int, tuple[NodeReport, float]] = {}
        self._delays: dict[int, LeastDelay] = {}
        self._before: dict[tuple[int, int, int, int], dict[int, int]] = {}

    def take(self, message: bytes) -> NodeReport | None:
        """A node's message; None if it is older than one that was taken.

        Raises:
            DiagnosticsError: it is none.
        """
        report, now_t = decode(message), time.time()
        with self._lock:
            known = self._reports.get(report.node)
            if known is not None and report.seq <= known[0].seq:
                return None
            self._reports[report.node] = report, time.monotonic()
            self._delays.setdefault(report.node, LeastDelay()).read(report.t, now_t)
        return report

    def reports(self) -> tuple[NodeReport, ...]:
        """The newest of each node, by node."""
        with self._lock:
            return tuple(report for _, (report, _) in sorted(self._reports.items()))

    def silent(self) -> tuple[int, ...]:
        """Nodes that have said nothing new for a while, or nothing at all."""
        with self._lock:
            read = {node: at_s for node, (_, at_s) in self._reports.items()}
        now_s = time.monotonic()
        return tuple(node for node in range(self._nodes) if now_s - read.get(node, -1e9) > self._stale_s)

    def heard(self, own: NodeReport) -> list[NodeReport]:
        """The newest message of every node; none while one of them is not heard.

        Args:
            own: this node's message, which nobody sends to itself.
        """
        if set(self.silent()) - {own.node}:
            return []
        return sorted([*(one for one in self.reports() if one.node != own.node), own], key=lambda one: one.node)

    def offsets(self) -> dict[int, ClockOffset]:
        """How far each node's clock is ahead of this one's, of those of which it is known."""
        with self._lock:
            known = {
                node: offset(report.heard_s, self._delays[node].least_s) for node, (report, _) in self._reports.items()
            }
        return {node: one for node, one in known.items() if one is not None}

    def conditions(self, host: str, rank: int | None = None) -> list[NodeCondition]:
        """What holds on a node now, as far as it concerns a rank."""
        found = [one for report in self.reports() if report.host == host for one in report.conditions]
        return [
            one for one in found if one.state in ("began", "lasts") and (not one.ranks or rank in (None, *one.ranks))
        ]

    def hung(self) -> tuple[Accused, ...]:
        """Ranks that their own launchers have found hung."""
        return tuple(one for report in self.reports() for one in report.hung)[:MOST_ACCUSED]

    def find_hung(self, own: NodeReport, rules: StallRules) -> tuple[Accused, ...]:
        """Whom the heartbeats and collectives of all ranks convict, twice in a row and on messages that were new each
        time. Nobody is named while a node is not heard, nor on weak evidence: that is left to each node.

        Args:
            own: this node's message.
            rules: how long a rank may be silent.
        """
        reports = self.heard(own)
        known = sum(len(one.ranks) for one in reports)
        found: dict[tuple[int, int, int, int], Accused] = {}
        if known == self._world_size and any(one.watched for one in reports):
            found = self._judge(reports, rules)
        numbers = {one.node: one.seq for one in reports}
        before, self._before = self._before, {}
        twice = []
        for name, one in found.items():
            first = before.get(name, numbers)
            self._before[name] = first
            if all(numbers[node] > first.get(node, numbers[node]) for node in numbers):
                twice.append(one)
        return tuple(twice[:MOST_ACCUSED])

    def suspects(self, own: NodeReport, told_after_s: float) -> tuple[Suspect, ...]:
        """Who keeps peers of any node waiting; nobody while a node is not heard.

        Args:
            own: this node's message.
            told_after_s: see :func:`outlast.diagnostics.live.suspects.find_suspects`.
        """
        now_s = time.monotonic()
        seen = [one for report in self.heard(own) for one in at(report.watched, now_s)]
        return find_suspects(seen, told_after_s, now_s, whole=len(seen) == self._world_size)[:MOST_ACCUSED]

    def _judge(self, reports: Sequence[NodeReport], rules: StallRules) -> dict[tuple[int, int, int, int], Accused]:
        now_s = time.monotonic()
        seen: dict[int, tuple[NodeReport, Observation]] = {}
        for report in reports:
            for one in at(report.watched, now_s):
                seen[one.rank] = report, one
        all_seen = [one for _, one in seen.values()]
        verdict = judge(all_seen, replace(rules, one_node=True), now_s)
        found = {}
        for culprit in verdict.culprits:
            report, one = seen[culprit.rank]
            # One that is inside a collective, and blamed without doubt, has left the common order.
            if culprit.weak or not (one.state == "stopped" or any(peer.pending for peer in all_seen)):
                continue
            name = culprit.rank, culprit.pid, culprit.step, one.entered
            found[name] = _accused(culprit, one, report)
        return found


def _accused(culprit: Culprit, one: Observation, report: NodeReport) -> Accused:
    words = [
        condition.words
        for condition in report.conditions
        if condition.state in ("began", "lasts") and culprit.rank in condition.ranks
    ]
    return Accused(
        rank=culprit.rank,
        node=report.node,
        host=report.host,
        pid=culprit.pid,
        step=culprit.step,
        entered=one.entered,
        silent_s=culprit.silent_s,
        limit_s=culprit.limit_s,
        evidence="; ".join((culprit.evidence, *words[:2])),
        inside=bool(one.pending),
    )
