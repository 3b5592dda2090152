"""What one node tells the others of its ranks: as JSON, in its own clock's terms, so that no clocks are compared.

A message says how long ago things happened when it was made. Whoever reads it later takes it for just that: a rank may
have gone on since, so its silence is never made longer than what its own node saw.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from outlast.diagnostics.live import PHASES, Beat, Collective, Observation, Ring
from outlast.diagnostics.live.stall import ProcessState
from outlast.diagnostics.monitor.conditions import NodeCondition
from outlast.diagnostics.syndromes.step_trace import RankSteps, decode_steps
from outlast.errors import DiagnosticsError

VERSION = 2
MOST_PENDING = 4
"""Collectives that a rank waits in and that are told, oldest first."""
MOST_CONDITIONS = 16
MOST_CHARS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Accused:
    """A rank that is at fault, as one node sees it or all together do."""

    rank: int
    node: int
    host: str
    pid: int
    step: int
    entered: int
    """Collectives it had entered; if it has entered more since, it goes on and is spared."""
    silent_s: float
    limit_s: float
    evidence: str
    inside: bool = False
    """Whether it waits in a collective itself, one that its peers are not in; else it is outside of any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """One node's message."""

    node: int
    """Its number in the round."""
    host: str
    seq: int
    """Greater in every message of the node."""
    t: float
    """Its time of day when it was made, seconds since the epoch."""
    heard_s: float | None = None
    """How far its clock was ahead of node 0's when it read a message of that one, at least: the least of several. None
    until it has."""
    ranks: tuple[int, ...] = ()
    """Its ranks whose processes run."""
    watched: tuple[Observation, ...] = ()
    """How they do, as :func:`ago` gives them; empty while all are well."""
    hung: tuple[Accused, ...] = ()
    """Ranks that its launcher has found hung itself, and ends."""
    accused: tuple[Accused, ...] = ()
    """Of node 0: the ranks that all nodes' words together convict, and those in ``hung`` of any node."""
    conditions: tuple[NodeCondition, ...] = ()
    """What holds on it now, and what ended last."""
    steps: tuple[RankSteps, ...] = ()
    """The newest steps of its ranks, in seconds before ``t``; empty from a version that tells none."""
    probe: int = 0
    """Of node 0: how often it has asked all nodes, in this round, to try out themselves and their links."""
    asked: tuple[int, ...] = ()
    """Of node 0: how often it has asked single nodes to try out themselves, and which nodes it asks now."""
    tested: Mapping[str, Any] | None = None
    """What came of the newest time that this node was asked, with its number as ``asked``; None before the first."""

    def encode(self) -> bytes:
        """As JSON."""
        told = {
            "v": VERSION,
            "node": self.node,
            "host": self.host,
            "seq": self.seq,
            "t": self.t,
            "heard_s": self.heard_s,
            "ranks": self.ranks,
            "watched": [_encoded(one) for one in self.watched],
            "hung": [asdict(one) for one in self.hung],
            "accused": [asdict(one) for one in self.accused],
            "conditions": [asdict(one) for one in self.conditions[-MOST_CONDITIONS:]],
            "steps": {one.rank: one.encode() for one in self.steps},
            "probe": self.probe,
            "asked": self.asked,
            "tested": self.tested,
        }
        return json.dumps(told, separators=(",", ":")).encode()


def decode(message: bytes) -> NodeReport:
    """A node's message.

    Raises:
        DiagnosticsError: it is none, or of another version.
    """
    try:
        told = json.loads(message)
        if told["v"] != VERSION:
            raise DiagnosticsError(f"a node's message of version {told['v']}; this version of outlast reads {VERSION}")
        return NodeReport(
            node=int(told["node"]),
            host=str(told["host"]),
            seq=int(told["seq"]),
            t=float(told["t"]),
            heard_s=None if told["heard_s"] is None else float(told["heard_s"]),
            ranks=tuple(map(int, told["ranks"])),
            watched=tuple(_decoded(one) for one in told["watched"]),
            hung=tuple(accused(one) for one in told["hung"]),
            accused=tuple(accused(one) for one in told["accused"]),
            conditions=tuple(_condition(one) for one in told["conditions"]),
            steps=tuple(decode_steps(int(rank), str(text)) for rank, text in told.get("steps", {}).items()),
            probe=int(told.get("probe", 0)),
            asked=tuple(map(int, told["asked"])),
            tested=None if told["tested"] is None else dict(told["tested"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DiagnosticsError(f"not a node's message: {message[:80]!r} ({error})") from error


def accused(told: Mapping[str, Any]) -> Accused:
    """Of a decoded message; raises KeyError, TypeError or ValueError if it is none."""
    return Accused(
        rank=int(told["rank"]),
        node=int(told["node"]),
        host=str(told["host"]),
        pid=int(told["pid"]),
        step=int(told["step"]),
        entered=int(told["entered"]),
        silent_s=float(told["silent_s"]),
        limit_s=float(told["limit_s"]),
        evidence=str(told["evidence"]),
        inside=bool(told.get("inside", False)),
    )


def ago(observations: Sequence[Observation], now_s: float) -> tuple[Observation, ...]:
    """Observations with times counted from now, so before 0. What was excused is no part of their silence any more.

    Args:
        observations: of this node's ranks.
        now_s: CLOCK_MONOTONIC seconds.
    """
    found = []
    for one in observations:
        silent_s = one.silent_s(now_s)
        beat = None if one.beat is None else replace(one.beat, t_s=-silent_s)
        found.append(_shifted(replace(one, beat=beat, started_s=-silent_s, excused_s=0.0), 0.0, -now_s))
    return tuple(found)


def at(observations: Sequence[Observation], now_s: float) -> tuple[Observation, ...]:
    """Observations of :func:`ago` on the reader's clock, as if they had been made at ``now_s``."""
    return tuple(_shifted(one, now_s, now_s) for one in observations)


def _shifted(one: Observation, by_s: float, ring_by_s: float) -> Observation:
    beat, ring = one.beat, one.ring
    if beat is not None:
        beat = replace(beat, t_s=beat.t_s + by_s)
    if ring is not None:
        pending = tuple(replace(call, entered_s=call.entered_s + ring_by_s) for call in ring.pending[:MOST_PENDING])
        ring = replace(ring, records=pending, torn=())
    return replace(one, beat=beat, ring=ring, started_s=one.started_s + by_s)


def _encoded(one: Observation) -> dict[str, Any]:
    beat, ring = one.beat, one.ring
    return {
        "rank": one.rank,
        "pid": one.pid,
        "state": one.state,
        "started_s": one.started_s,
        "idle_s": one.idle_s,
        "beat": None if beat is None else [beat.phase, beat.step, beat.t_s, beat.median_step_s],
        "entered": None if ring is None else ring.entered,
        "pending": [
            [call.seq, call.op, call.label, call.nbytes, call.step, call.entered_s, call.group, call.group_seq]
            for call in (() if ring is None else ring.records)
        ],
    }


def _decoded(told: Mapping[str, Any]) -> Observation:
    rank, pid, state = int(told["rank"]), int(told["pid"]), told["state"]
    if state not in get_args(ProcessState):
        raise ValueError(f"no state {state!r}")
    beat = ring = None
    if told["beat"] is not None:
        phase, step, t_s, median_s = told["beat"]
        if phase not in PHASES:
            raise ValueError(f"no phase {phase!r}")
        beat = Beat(rank, pid, phase, int(step), float(t_s), float(median_s))
    if told["entered"] is not None:
        calls = tuple(
            Collective(
                int(seq), str(op), str(label), int(nbytes), int(step), float(at_s), None, str(group), int(group_seq)
            )
            for seq, op, label, nbytes, step, at_s, group, group_seq in told["pending"][:MOST_PENDING]
        )
        ring = Ring(rank, pid, MOST_PENDING, int(told["entered"]), calls, ())
    return Observation(
        rank=rank,
        pid=pid,
        state=state,
        started_s=float(told["started_s"]),
        beat=beat,
        ring=ring,
        idle_s=float(told["idle_s"]),
    )


def _condition(told: Mapping[str, Any]) -> NodeCondition:
    return NodeCondition(
        host=str(told["host"]),
        what=str(told["what"]),
        state=told["state"],
        words=str(told["words"])[:MOST_CHARS],
        since_t=float(told["since_t"]),
        seconds=float(told["seconds"]),
        measured_s=None if told["measured_s"] is None else float(told["measured_s"]),
        value=float(told["value"]),
        ranks=tuple(map(int, told["ranks"])),
        key=str(told["key"]),
    )
