"""A job that never ran: ranks in nodes and pipeline stages, their collectives, noise, clocks that disagree, and faults.

Time is simulated for all ranks at once. A rank that hangs goes on at infinity, and with it everything that waits for
it, so that the trace, cut at some moment, holds what real ranks would have left by then.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from outlast.diagnostics.syndromes.crash import Ended
from outlast.diagnostics.syndromes.facts import Fact
from outlast.diagnostics.syndromes.trace import (
    DEAD,
    RUNNING,
    STOPPED,
    UNKNOWN,
    Calls,
    Clocks,
    Job,
    Links,
    Signs,
    Trace,
)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

OPS = ("all_reduce", "all_gather", "send", "recv")
ALL_REDUCE, ALL_GATHER, SEND, RECV = range(4)
BUCKETS = (4_000_000, 6_000_000, 9_000_000)
BUCKET_S = 0.03
"""Over a healthy link."""
FORWARD_S, BACKWARD_S, UPDATE_S, DATA_S = 0.10, 0.16, 0.05, 0.02
CHUNKS = len(BUCKETS)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """``rank = (replica * pp + stage) * tp + shard``; nodes hold ranks in order."""

    nodes: int = 4
    per_node: int = 4
    tp: int = 2
    pp: int = 2

    @property
    def world_size(self) -> int:
        return self.nodes * self.per_node

    @property
    def dp(self) -> int:
        return self.world_size // (self.tp * self.pp)

    def job(self) -> Job:
        rank = np.arange(self.world_size)
        names = [f"tp{one}" for one in range(self.dp * self.pp)] + [f"dp{one}" for one in range(self.pp * self.tp)]
        return Job(
            nodes=tuple(f"node-{one}" for one in range(self.nodes)),
            node_of=rank // self.per_node,
            roles=tuple(f"stage {one}" for one in range(self.pp)),
            role_of=rank // self.tp % self.pp,
            groups=(*names, "pp"),
            members=(*self.tp_groups, *self.dp_groups, rank),
        )

    @property
    def tp_groups(self) -> Ints:
        """[groups, ranks]"""
        return np.arange(self.world_size).reshape(-1, self.tp)

    @property
    def dp_groups(self) -> Ints:
        """[groups, ranks]"""
        return np.ascontiguousarray(np.arange(self.world_size).reshape(self.dp, -1).T)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong, where, and in which step."""

    kind: str = ""
    rank: int = 0
    node: int = 0
    other: int = 1
    step: int = 20
    chunk: int = 0
    """Of the backward pass."""
    seconds: float = np.inf
    factor: float = 1.0


@dataclass
class Simulation:
    """One job until ``steps`` are done, or everything stands still."""

    layout: Layout
    seed: int
    fault: Fault = field(default_factory=Fault)
    steps: int = 40
    noise: float = 0.03
    begun_s: float = np.inf
    """When the fault began, true time."""

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.job = self.layout.job()
        n = self.layout.world_size
        self.t = np.zeros(n)
        self.speed = self.random.normal(1.0, 0.01, n).clip(0.97, 1.03)  # no two machines are alike
        self.free = np.zeros(len(self.job.groups))
        self.counts = np.zeros((len(self.job.groups), n), dtype=np.int64)
        self.background = np.zeros(n)
        self.columns: list[tuple[npt.NDArray[np.generic], ...]] = []
        self.messages: list[tuple[npt.NDArray[np.generic], ...]] = []
        self.facts: list[tuple[float, Fact]] = []
        self.stage = self.job.role_of
        stage_scale = self.random.uniform(0.8, 1.25, self.layout.pp)  # stages differ, and that is no fault
        self.scale = stage_scale[self.stage]

    def run(self) -> Simulation:
        for step in range(self.steps):
            self.step(step)
        return self

    def step(self, step: int) -> None:
        layout, fault = self.layout, self.fault
        self.work(DATA_S, step, "data")
        if fault.kind == "data_stall" and step == fault.step:
            self.pause_all(fault.seconds, jitter_s=0.5)
        if fault.kind == "evaluation" and step == fault.step:
            self.pause_all(fault.seconds, jitter_s=2.0)
        if fault.kind == "first_step" and step == 0:
            self.pause_all(fault.seconds, jitter_s=4.0)
        if fault.kind == "suspended" and step == fault.step:
            self.begun_s = float(self.t.max())
            self.t += fault.seconds
        if fault.kind == "checkpoint_alone" and step == fault.step:
            self.begun_s = float(self.t[fault.rank])
            self.t[fault.rank] += fault.seconds
        for stage in range(layout.pp):
            here = self.stage == stage
            if stage:
                self.hand_over(stage - 1, stage, step)
            for _ in range(2):
                self.work(FORWARD_S, step, "forward", here)
                self.meet(self.tp_of(stage), ALL_REDUCE, 1_000_000, 0.002, step)
        for stage in reversed(range(layout.pp)):
            here = self.stage == stage
            if stage < layout.pp - 1:
                self.hand_over(stage + 1, stage, step)
            for chunk in range(CHUNKS):
                self.hang(step, chunk, stage, "before")
                self.work(BACKWARD_S, step, "backward", here)
                self.meet(self.tp_of(stage), ALL_REDUCE, 1_000_000, 0.002, step)
                self.bucket(stage, chunk, step)
                self.hang(step, chunk, stage, "after")
        self.t = np.maximum(self.t, self.background)  # then the norm of all gradients
        self.meet(np.concatenate([self.dp_of(stage) for stage in range(layout.pp)]), ALL_REDUCE, 8, 0.002, step)
        self.work(UPDATE_S, step, "update")

    def tp_of(self, stage: int) -> Ints:
        """Indices of the tensor-parallel groups of a stage."""
        return np.arange(self.layout.dp) * self.layout.pp + stage

    def dp_of(self, stage: int) -> Ints:
        first = self.layout.dp * self.layout.pp + stage * self.layout.tp
        return np.arange(first, first + self.layout.tp)

    def pause_all(self, seconds: float, *, jitter_s: float) -> None:
        self.begun_s = float(self.t.min())
        self.t += seconds + self.random.uniform(-jitter_s, jitter_s, len(self.t))

    def work(self, mean_s: float, step: int, part: str, here: npt.NDArray[np.bool_] | None = None) -> None:
        fault = self.fault
        took = mean_s * self.scale * self.speed * self.random.lognormal(0.0, self.noise, len(self.t))
        if step >= fault.step:
            if fault.kind in ("slow_compute", "throttled") or (fault.kind == "slow_backward" and part == "backward"):
                took[fault.rank] *= fault.factor
                self.begin(fault.rank)
            if fault.kind == "slow_node":
                took[self.job.node_of == fault.node] *= fault.factor
            if fault.kind == "slow_role":
                took[self.stage == fault.node % self.layout.pp] *= fault.factor
        collects = fault.kind == "garbage" and part == "forward" and self.random.random() < 0.25
        if collects and here is not None and here[fault.rank]:
            took[fault.rank] += fault.seconds
            self.note("garbage_collection", fault.rank, self.t[fault.rank], fault.seconds)
        if fault.kind == "spike" and step == fault.step and part == "update":
            took[fault.rank] += fault.seconds
        self.t = self.t + (took if here is None else np.where(here, took, 0.0))

    def begin(self, rank: int) -> None:
        self.begun_s = min(self.begun_s, float(self.t[rank]))

    def note(self, kind: str, rank: int, at_s: float, lost_s: float) -> None:
        if np.isfinite(at_s):
            fact = Fact(
                kind=kind,  # type: ignore[arg-type]
                node=self.job.node(rank),
                rank=rank,
                begin_s=at_s,
                end_s=at_s + lost_s,
                value=lost_s,
                lost_s=lost_s,
            )
            self.facts.append((at_s, fact))

    def hang(self, step: int, chunk: int, stage: int, where: str) -> None:
        fault = self.fault
        if step != fault.step or chunk != fault.chunk:
            return
        before = fault.kind in ("stopped", "dead", "sleep_before", "early_exit") and where == "before"
        if (before or (fault.kind == "sleep_after" and where == "after")) and self.stage[fault.rank] == stage:
            self.begin(fault.rank)
            self.t[fault.rank] += fault.seconds
        if fault.kind == "node_gone" and where == "before":
            mine = (self.job.node_of == fault.node) & (self.stage == stage)
            if mine.any():
                self.begun_s = min(self.begun_s, float(self.t[mine].min()))
                self.t[self.job.node_of == fault.node] = np.inf

    def hand_over(self, source: int, target: int, step: int) -> None:
        """One stage sends to the next one, in the background; that one waits."""
        stage = self.stage
        a = np.flatnonzero(stage == source)
        b = a + (target - source) * self.layout.tp
        sent = self.t[a]
        group = len(self.job.groups) - 1
        arrived = sent + 0.004 * self.random.lognormal(0, 0.1, len(a))
        self.add(a, group, SEND, 500_000, step, sent, arrived, peer=b)
        done = np.maximum(self.t[b], arrived) + 0.0001
        self.add(b, group, RECV, 500_000, step, self.t[b], done, peer=a)
        self.t[b] = done

    def bucket(self, stage: int, chunk: int, step: int) -> None:
        """Gradients are averaged in the background."""
        fault = self.fault
        groups = self.dp_of(stage)
        members = np.stack([self.job.members[group] for group in groups])
        now = step == fault.step and chunk == fault.chunk
        nbytes = np.full(members.shape, BUCKETS[chunk])
        absent = np.zeros(members.shape, dtype=np.bool_)
        stuck = np.zeros(len(groups), dtype=np.bool_)
        mine = (members == fault.rank).any(axis=1)
        if mine.any() and fault.kind == "skipped":
            if now:
                absent = members == fault.rank
            stuck = mine & ((step, chunk) >= (fault.step, fault.chunk))
        if now and fault.kind == "wrong_size":
            nbytes[members == fault.rank] *= 2
        if mine.any() and (step, chunk) >= (fault.step, fault.chunk) and fault.kind in ("wrong_size", "sleep_inside"):
            stuck = mine
        if now and mine.any() and fault.kind in ("skipped", "wrong_size", "sleep_inside"):
            self.begin(fault.rank)
        link_s = np.full(members.shape, BUCKET_S) * BUCKETS[chunk] / BUCKETS[0]
        link_s = link_s * self.random.lognormal(0.0, 0.08, link_s.shape)
        nexts = np.roll(members, -1, axis=1)
        if step >= fault.step and fault.kind in ("slow_link", "cut_link", "slow_adapter"):
            node_a, node_b = self.job.node_of[members], self.job.node_of[nexts]
            hit = (node_a == fault.node) & (node_b == (fault.node + 1) % self.layout.nodes)
            if fault.kind == "slow_adapter":
                hit = (node_a != node_b) & ((node_a == fault.node) | (node_b == fault.node))
            if fault.kind == "cut_link":
                if now or (step, chunk) >= (fault.step, fault.chunk):
                    stuck |= hit.any(axis=1)
                    self.begun_s = min(self.begun_s, float(self.t[members].max()))
            else:
                link_s[hit] *= fault.factor
        enter = self.t[members]
        ready = np.where(absent, -np.inf, enter).max(axis=1)
        ready = np.maximum(ready, self.free[groups])
        done = ready + link_s.max(axis=1)
        done[stuck] = np.inf
        self.free[groups] = done
        ends = done[:, None] + self.random.uniform(0, 0.0005, members.shape)
        present = ~absent
        self.add(
            members[present],
            np.broadcast_to(groups[:, None], members.shape)[present],
            ALL_REDUCE,
            nbytes[present],
            step,
            enter[present],
            ends[present],
        )
        self.background[members[present]] = np.maximum(self.background[members[present]], ends[present])
        lost = np.zeros(members.shape, dtype=np.bool_)
        if stuck.any() and fault.kind == "cut_link":
            node_a, node_b = self.job.node_of[members], self.job.node_of[nexts]
            lost = (node_a == fault.node) & (node_b == (fault.node + 1) % self.layout.nodes)
        if stuck.any() and fault.kind == "sleep_inside":
            lost = (nexts == fault.rank) | (np.roll(nexts, -1, axis=1) == fault.rank)
            nexts = np.where(np.roll(nexts, -1, axis=1) == fault.rank, fault.rank, nexts)
        begin = np.broadcast_to(ready[:, None], members.shape)
        arrived = np.where(lost, np.inf, begin + link_s)
        known = np.isfinite(begin) & (lost | ~stuck[:, None])
        self.messages.append((members[known], nexts[known], nbytes[known], begin[known], arrived[known]))

    def meet(self, groups: Ints, op: int, nbytes: int, transfer_s: float, step: int) -> None:
        """A collective that its ranks wait for."""
        members = np.stack([self.job.members[group] for group in groups])
        enter = self.t[members]
        done = enter.max(axis=1) + transfer_s * self.random.lognormal(0, 0.1, len(groups))
        ends = done[:, None] + self.random.uniform(0, 0.0001, members.shape)
        self.add(members.ravel(), np.repeat(groups, members.shape[1]), op, nbytes, step, enter.ravel(), ends.ravel())
        self.t[members] = ends

    def add(
        self,
        rank: Ints,
        group: Ints | int,
        op: int,
        nbytes: Ints | int,
        step: int,
        enter: Floats,
        done: Floats,
        peer: Ints | int = -1,
    ) -> None:
        group = np.full(len(rank), group) if isinstance(group, int) else group
        seq = self.counts[group, rank]
        np.add.at(self.counts, (group, rank), 1)
        full = [np.full(len(rank), one) if isinstance(one, int) else one for one in (op, nbytes, step, peer)]
        self.columns.append((rank, group, seq, full[0], full[1], full[2], full[3], enter, done))

    def trace(
        self,
        now_s: float,
        *,
        window: int = 40,
        state: dict[int, int] | None = None,
        phase: dict[int, str] | None = None,
        silent_nodes: tuple[int, ...] = (),
        excused_s: float = 0.0,
        clock_error_s: float = 0.005,
    ) -> Trace:
        """What is known at a moment of true time. The clock of each node has an offset of its own, of hours."""
        rank, group, seq, op, nbytes, step, peer, enter, done = (
            np.concatenate([one[at] for one in self.columns]) for at in range(9)
        )
        nodes = self.layout.nodes
        random = np.random.default_rng(self.seed + 1)
        ahead = random.uniform(0, 1e5, nodes)
        heard = np.full(nodes, now_s)
        for node in silent_nodes:
            heard[node] = min(now_s, self.begun_s)
        seen = enter <= heard[self.job.node_of[rank]]
        newest = int(step[seen].max(initial=0))
        keep = seen & (step > newest - window)
        of = self.job.node_of[rank[keep]]
        done = np.where(done[keep] > heard[of], np.nan, done[keep] + ahead[of])
        calls = Calls(
            rank=rank[keep],
            group=group[keep],
            seq=seq[keep],
            op=op[keep],
            nbytes=nbytes[keep],
            dtype=np.zeros(int(keep.sum()), dtype=np.int64),
            step=step[keep],
            enter_s=enter[keep] + ahead[of],
            done_s=done,
            peer=peer[keep],
            ops=OPS,
            dtypes=("Float",),
        )
        n = self.layout.world_size
        states = np.full(n, RUNNING)
        phases = np.full(n, "step", dtype="U16")
        for one, value in (state or {}).items():
            states[one] = value
        for one, name in (phase or {}).items():
            phases[one] = name
        for node in silent_nodes:
            states[self.job.node_of == node] = UNKNOWN
        steps = np.zeros(n, dtype=np.int64)
        np.maximum.at(steps, rank[seen], step[seen])
        last = np.full(n, -np.inf)
        np.maximum.at(last, rank[seen], enter[seen])
        signs = Signs(
            state=states,
            phase=phases,
            step=steps,
            beat_s=np.where(np.isfinite(last), last, np.nan) + ahead[self.job.node_of],
            idle_s=np.zeros(n),
        )
        clocks = Clocks(
            now_s=heard + ahead,
            ahead_s=ahead + random.uniform(-clock_error_s, clock_error_s, nodes),
            error_s=np.full(nodes, clock_error_s),
            silent_s=now_s - heard,
            excused_s=np.full(nodes, excused_s),
        )
        return Trace(job=self.job, calls=calls, signs=signs, clocks=clocks, links=self.links(now_s, ahead))

    def links(self, now_s: float, ahead: Floats) -> Links:
        source, target, nbytes, begin, done = (np.concatenate([one[at] for one in self.messages]) for at in range(5))
        seen = begin <= now_s
        mine = ahead[self.job.node_of[source[seen]]]
        return Links(
            source=source[seen],
            target=target[seen],
            nbytes=nbytes[seen],
            begin_s=begin[seen] + mine,
            done_s=np.where(done[seen] > now_s, np.nan, done[seen] + mine),
        )

    def known_facts(self, trace: Trace, now_s: float) -> list[Fact]:
        """Those of before a moment, on the clocks of the trace's nodes."""
        found = []
        for at_s, one in self.facts:
            if at_s <= now_s:
                node = self.job.nodes.index(one.node)
                ahead = float(trace.clocks.now_s[node]) - now_s
                found.append(
                    Fact(
                        kind=one.kind,
                        node=one.node,
                        rank=one.rank,
                        begin_s=one.begin_s + ahead,
                        end_s=one.end_s + ahead,
                        value=one.value,
                        lost_s=one.lost_s,
                        detail=one.detail,
                    )
                )
        return found


__all__ = ["DEAD", "STOPPED", "Ended", "Fault", "Layout", "Simulation"]
