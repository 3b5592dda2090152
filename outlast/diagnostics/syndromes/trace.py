"""What is known of a job at one moment, as columns: who is where, what was called, how each rank does, whose clock.

Each time is CLOCK_MONOTONIC seconds of the node it was taken on. Times of different nodes are compared only through
:class:`Clocks`, and only where its error allows that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from outlast.errors import DiagnosticsError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

RUNNING, STOPPED, DEAD, UNKNOWN = range(4)
"""States of a process: as psutil sees it; ``UNKNOWN`` where its node has not told."""
STATES = ("running", "stopped (state T)", "dead", "unknown")


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """Who is where: fixed while a generation lasts."""

    nodes: tuple[str, ...]
    node_of: Ints
    """[ranks]: index into ``nodes``."""
    roles: tuple[str, ...] = ("",)
    role_of: Ints
    """[ranks]: index into ``roles``. Ranks of a role do the same work: a pipeline stage, an expert's place."""
    groups: tuple[str, ...] = ()
    """Names of process groups."""
    members: tuple[Ints, ...] = ()
    """By group, its ranks in ascending order."""

    def __post_init__(self) -> None:
        if len(self.groups) != len(self.members):
            raise DiagnosticsError(f"{len(self.groups)} groups have {len(self.members)} lists of ranks")
        if len(self.node_of) != len(self.role_of):
            raise DiagnosticsError(f"{len(self.node_of)} ranks have {len(self.role_of)} roles")

    @property
    def world_size(self) -> int:
        return len(self.node_of)

    @cached_property
    def slots(self) -> Ints:
        """[memberships]: ``group x world size + rank`` of every rank of every group, ascending."""
        parts = [group * self.world_size + ranks for group, ranks in enumerate(self.members)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    @cached_property
    def slot_starts(self) -> Ints:
        """[groups + 1]: where the memberships of each group begin in :attr:`slots`."""
        return np.concatenate([[0], np.cumsum([len(ranks) for ranks in self.members], dtype=np.int64)])

    @cached_property
    def is_across(self) -> Bools:
        """[groups]: whether it has ranks on several nodes."""
        return np.asarray([len(np.unique(self.node_of[ranks])) > 1 for ranks in self.members], dtype=np.bool_)

    def node(self, rank: int) -> str:
        """The name of its node."""
        return self.nodes[int(self.node_of[rank])]

    def role(self, rank: int) -> str:
        """The name of its role."""
        return self.roles[int(self.role_of[rank])]

    def ranks_on(self, node: int) -> Ints:
        """The ranks of a node, ascending."""
        return np.flatnonzero(self.node_of == node)


@dataclass(frozen=True, kw_only=True, eq=False)
class Calls:
    """Collectives and point-to-point operations of all ranks, one row for each rank and call, in any order."""

    rank: Ints
    group: Ints
    """Index into :attr:`Job.groups`."""
    seq: Ints
    """Position in the group, the same on all of its ranks; of point-to-point operations the rank's own count."""
    op: Ints
    """Index into ``ops``."""
    nbytes: Ints
    dtype: Ints
    """Index into ``dtypes``."""
    step: Ints
    enter_s: Floats
    done_s: Floats
    """NaN while it is pending. Equal to ``enter_s`` where it has completed and nobody knows when."""
    peer: Ints
    """The other rank of a point-to-point operation, -2 where any will do; -1 of a collective."""
    ops: tuple[str, ...]
    dtypes: tuple[str, ...] = ("",)

    @property
    def pending(self) -> Bools:
        return np.isnan(self.done_s)

    @property
    def timed(self) -> Bools:
        """Whether it is known when it completed."""
        known: Bools = self.done_s > self.enter_s
        return known

    @property
    def collective(self) -> Bools:
        found: Bools = self.peer == -1
        return found

    def __len__(self) -> int:
        return len(self.rank)

    def name(self, row: int) -> str:
        """``all_reduce #12 of step 7``."""
        return f"{self.ops[int(self.op[row])]} #{int(self.seq[row])} of step {int(self.step[row])}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Signs:
    """How each rank does: its process and its newest heartbeat. All are [ranks]."""

    state: Ints
    phase: npt.NDArray[np.str_]
    """As :data:`outlast.diagnostics.live.heartbeat.PHASES` names it; empty before the first beat."""
    step: Ints
    beat_s: Floats
    """NaN before the first beat."""
    idle_s: Floats
    """Seconds for which the process has computed, read and written next to nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Clocks:
    """The nodes' clocks. All are [nodes]."""

    now_s: Floats
    """What each node's clock showed when its part of the trace was taken."""
    ahead_s: Floats
    """How far it is ahead of the collector's."""
    error_s: Floats
    """By how much that may be wrong, at most."""
    silent_s: Floats
    """Seconds since anything was heard of the node, on the collector's clock."""
    excused_s: Floats
    """Seconds until ``now_s`` in which its watcher did not run: it was stopped, or its machine was suspended."""

    @classmethod
    def alike(cls, now_s: Sequence[float], error_s: float = 0.0) -> Clocks:
        """Clocks that agree, of nodes that have just been heard of."""
        now = np.asarray(now_s, dtype=np.float64)
        zero = np.zeros_like(now)
        return cls(now_s=now, ahead_s=zero, error_s=zero + error_s, silent_s=zero, excused_s=zero)


@dataclass(frozen=True, kw_only=True, eq=False)
class Links:
    """Messages between ranks, where the transport or a probe knows them: one row for each."""

    source: Ints
    target: Ints
    nbytes: Ints
    begin_s: Floats
    """When the sender handed it over, on its node's clock."""
    done_s: Floats
    """When it was acknowledged; NaN while it is not."""

    @classmethod
    def none(cls) -> Links:
        """Where nothing is known of single messages."""
        ints, floats = np.empty(0, dtype=np.int64), np.empty(0)
        return cls(source=ints, target=ints, nbytes=ints, begin_s=floats, done_s=floats)

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """A job's newest calls, and how its ranks do."""

    job: Job
    calls: Calls
    signs: Signs
    clocks: Clocks
    links: Links = field(default_factory=Links.none)

    @cached_property
    def order(self) -> Ints:
        """[calls]: their indices, rank by rank in the order in which each entered them."""
        return np.lexsort((self.calls.enter_s, self.calls.rank))

    @cached_property
    def waited_s(self) -> Floats:
        """[calls]: seconds for which a pending call has been pending and watched, on its own clock; else 0."""
        node = self.job.node_of[self.calls.rank]
        waited = self.clocks.now_s[node] - self.calls.enter_s
        waited = np.minimum(waited, np.maximum(waited - self.clocks.excused_s[node], 0.0))
        return np.where(self.calls.pending, waited, 0.0)

    def common_s(self, rank: Ints, times_s: Floats) -> Floats:
        """Times of ranks on the collector's clock, each good to the error of its node's clock."""
        common: Floats = times_s - self.clocks.ahead_s[self.job.node_of[rank]]
        return common
