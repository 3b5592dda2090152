"""What this launcher tells the other nodes' launchers of its ranks, and what it hears of theirs.

Node 0 judges from the heartbeats and collectives of all ranks, and says who is at fault. Every launcher names that
rank, and the one that started it looks again and ends it. Without node 0, and while a node is not heard, each judges
its own ranks as if there were no word of the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch.distributed as dist

from outlast.diagnostics.live import Observation, StallRules
from outlast.diagnostics.monitor import (
    Accused,
    Collector,
    LeastDelay,
    NodeClock,
    NodeCondition,
    NodeReport,
    ago,
    facts_of,
)
from outlast.diagnostics.syndromes.facts import Fact
from outlast.diagnostics.syndromes.places import node_names
from outlast.diagnostics.syndromes.step_trace import NodeSteps, RankSteps
from outlast.errors import DiagnosticsError
from outlast.events import EventLog
from outlast.launch.node_exchange import NodeExchange
from outlast.launch.node_trials import NodeTrials
from outlast.launch.standstill_probe import StandstillProbe
from outlast.launch.suspicions import Suspicions

STALE_LOOKS = 4.0
"""Intervals after which what this launcher saw of its ranks is too old to be told as new."""
CLOCKS_EVERY_S = 5.0
LARGEST_ERROR_S = 0.5
"""A clock is told of once it is known this well."""
WORTH_TELLING_S = 0.1
"""... and again when it has changed by more, beyond what is uncertain."""

log = logging.getLogger("outlast.launch")


class OtherNodes:
    """The launchers of a job's other nodes, in one round of the rendezvous.

    Args:
        store: of all launchers.
        secret: of the run.
        round_name: differs between rounds and between jobs.
        node: this node's number in the round.
        nodes: how many there are.
        world_size: ranks of all nodes.
        host: this node's name.
        rules: how long a rank may be silent.
        interval_s: between two messages.
        told_after_s: from when on a rank is told of that keeps its peers waiting.
        conditions: what holds on this node.
        events: where clocks are written.
        probe: of nodes and links, when all stand still.
        trials: of nodes that are about to be accused of being slow.
    """

    def __init__(
        self,
        store: dist.Store,  # type: ignore[name-defined]
        *,
        secret: bytes,
        round_name: str,
        node: int,
        nodes: int,
        world_size: int,
        host: str,
        rules: StallRules,
        interval_s: float,
        told_after_s: float,
        conditions: Callable[[], Sequence[NodeCondition]],
        events: EventLog,
        probe: StandstillProbe | None = None,
        trials: NodeTrials | None = None,
    ) -> None:
        self.probe, self.trials = probe, trials
        self._node, self._host, self._rules = node, host, rules
        self._conditions, self._events = conditions, events
        self._told_after_s, self._suspicions = told_after_s, Suspicions(events)
        self._lock = threading.Lock()
        self._own = NodeReport(node=node, host=host, seq=0, t=0.0)
        self._looked_s = time.monotonic()
        self._message = b""
        self._told: set[tuple[int, int]] = set()
        self._heard = LeastDelay()
        self._accused: tuple[Accused, ...] = ()
        self._clocks: dict[int, NodeClock] = {}
        self._clocks_at_s = time.monotonic()
        self._exchange = NodeExchange(
            store,
            secret=secret,
            round_name=round_name,
            node=node,
            nodes=nodes,
            interval_s=interval_s,
            write=self._write,
            read=self._read,
        )
        self._stale_s = STALE_LOOKS * self._exchange.interval_s
        self.collector = Collector(nodes, world_size, self._exchange.interval_s)
        """On node 0, what all nodes told."""

    def start(self) -> None:
        """Begin to tell and to hear."""
        self._exchange.start()

    @property
    def accused(self) -> tuple[Accused, ...]:
        """Ranks that are at fault, of this node or of others, as node 0 says."""
        with self._lock:
            return self._accused

    def look(
        self,
        ranks: Iterable[int],
        watched: Sequence[Observation],
        hung: Sequence[Accused],
        steps: Sequence[RankSteps] = (),
        *,
        stands_still: bool = False,
    ) -> None:
        """Tell the others how this node's ranks do; on node 0, judge. Called by the thread that watches the ranks.

        Args:
            ranks: those whose processes run.
            watched: how they do; empty while all are well.
            hung: those that this launcher has convicted in this start.
            steps: their newest steps, in seconds before now.
            stands_still: whether none of them makes progress, and this launcher knows nobody to blame.
        """
        now_s = time.monotonic()
        is_new = len(hung) > len(self._own.hung)
        before = self._own.asked, self._own.tested
        with self._lock:
            self._looked_s = now_s
            self._own = own = NodeReport(
                node=self._node,
                host=self._host,
                seq=self._own.seq + 1,
                t=time.time(),
                heard_s=self._heard.least_s,
                ranks=tuple(ranks),
                watched=ago(watched, now_s),
                hung=tuple(hung),
                accused=self._own.accused,
                conditions=tuple(self._conditions()),
                steps=tuple(steps),
                probe=self._own.probe,
                asked=self.trials.asked if self.trials is not None and self._node == 0 else (),
                tested=self.trials.tested if self.trials is not None else None,
            )
            is_new = is_new or (own.asked, own.tested) != before
        if self._node == 0:
            found = {(one.rank, one.pid): one for one in self.collector.find_hung(own, self._rules)}
            found |= {(one.rank, one.pid): one for one in (*self.collector.hung(), *hung)}
            is_new = is_new or found.keys() > {(one.rank, one.pid) for one in own.accused}
            with self._lock:
                self._accused = tuple(found.values())
                self._own = replace(own, accused=self._accused)
            self._suspicions.tell(self.collector.suspects(own, self._told_after_s))
            if self.probe is not None:
                number = self.probe.look(stands_still=stands_still and not found)
                is_new = is_new or number > own.probe
                with self._lock:
                    self._own = replace(self._own, probe=number)
            if self.trials is not None:
                for report in self.collector.reports():
                    self.trials.hear(report.node, report.tested)
            self._tell_clocks(now_s)
        self._name(self.accused)
        if is_new:
            self._exchange.hurry()

    def steps(self) -> tuple[list[NodeSteps], list[Fact]]:
        """On node 0: the newest steps of all ranks, each node's in seconds before its own message, and what the nodes'
        monitors have seen; nothing while a node is not heard."""
        with self._lock:
            own = self._own
        reports = self.collector.heard(own)
        names = node_names([one.host for one in reports])
        nodes: list[NodeSteps] = []
        facts: list[Fact] = []
        for name, one in zip(names, reports, strict=True):
            nodes.append(NodeSteps(node=name, now_s=0.0, ranks=one.steps))
            facts += facts_of(one.conditions, node=name, t=one.t, at_s=0.0)
        return nodes, facts

    def close(self) -> None:
        """The ranks of this start have ended: hear once more who was at fault, and end."""
        if self.probe is not None:
            self.probe.close()
        if self.trials is not None:
            self.trials.close()
        self._exchange.close()
        if self._node == 0:
            with self._lock:
                self._accused = (*self._accused, *self.collector.hung())
        self._name(self.accused)

    def _name(self, accused: Iterable[Accused]) -> None:
        """A rank of another node, once; this node's own are told where they are ended."""
        for one in accused:
            if one.node == self._node or (one.rank, one.pid) in self._told:
                continue
            self._told.add((one.rank, one.pid))
            log.error(
                "outlast: rank %d on node %d (%s) hangs at step %d (silent for %.1f s, limit %.1f s): %s; its own "
                "launcher ends it",
                *(one.rank, one.node, one.host, one.step, one.silent_s, one.limit_s, one.evidence),
            )

    def _write(self, number: int) -> bytes:
        """The next message, in the exchange's thread; the one before, if this launcher has seen nothing new."""
        with self._lock:
            own, looked_s = self._own, self._looked_s
        if self._message and time.monotonic() - looked_s > self._stale_s:
            return self._message
        now_t = time.time()
        self._message = replace(own, seq=number, t=now_t, steps=_later(own.steps, now_t - own.t)).encode()
        return self._message

    def _read(self, node: int, message: bytes) -> None:
        """A message of another node, in the exchange's thread."""
        now_t = time.time()
        try:
            report = self.collector.take(message)
        except DiagnosticsError as error:
            log.debug("outlast: node %d: %s", node, error)
            return
        if report is None or report.node != node:
            return
        if node == 0:
            self._heard.read(report.t, now_t)
            with self._lock:
                self._accused = report.accused
            if self.probe is not None:
                self.probe.take_part(report.probe)
            if self.trials is not None:
                self.trials.take_part(report.asked)

    def _tell_clocks(self, now_s: float) -> None:
        if now_s - self._clocks_at_s < CLOCKS_EVERY_S:
            return
        self._clocks_at_s = now_s
        hosts = {report.node: report.host for report in self.collector.reports()}
        for node, one in self.collector.offsets().items():
            told = self._clocks.get(node)
            changed_s = abs(one.ahead_s - told.ahead_s) - one.error_s - told.error_s if told is not None else 1.0
            if one.error_s > LARGEST_ERROR_S or changed_s < WORTH_TELLING_S:
                continue
            self._clocks[node] = clock = NodeClock(
                host=hosts[node], node=node, ahead_s=one.ahead_s, error_s=one.error_s
            )
            self._events.write(clock)


def _later(steps: Iterable[RankSteps], by_s: float) -> tuple[RankSteps, ...]:
    """Steps in seconds before a later moment."""
    return tuple(replace(one, done_s=tuple(at_s - by_s for at_s in one.done_s)) for one in steps)
