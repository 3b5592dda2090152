"""Verdicts from rings and heartbeats as ranks write them, and the same culprit as the watch of a single node names."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from outlast.diagnostics.live import Heartbeat, Recorder, StallRules, heartbeat_path, judge, observe, ring_path
from outlast.diagnostics.live.heartbeat import Beat
from outlast.diagnostics.live.recorder import Collective, Ring
from outlast.diagnostics.live.stall import Observation
from outlast.diagnostics.syndromes.analyse import analyse
from outlast.diagnostics.syndromes.from_live import NodeView, trace_of
from outlast.diagnostics.syndromes.rules import Rules
from outlast.diagnostics.syndromes.trace import DEAD, STATES, STOPPED, Trace
from outlast.errors import DiagnosticsError
from tests.diagnostics.syndromes.cases import CASES
from tests.diagnostics.syndromes.traces import Layout


def test_from_shared_memory_to_the_rank_that_is_absent(shm: Path) -> None:
    recorders = [Recorder(ring_path(shm, rank), rank=rank, capacity=64) for rank in range(4)]
    beats = [Heartbeat(heartbeat_path(shm, rank), rank=rank) for rank in range(4)]
    for step in range(6):
        for rank, recorder in enumerate(recorders):
            beats[rank].beat("step", step)
            recorder.step = step
            if step < 5 or rank != 2:
                token = recorder.enter("all_reduce", 4096, "gradients")
                if step < 5:
                    time.sleep(0.001)
                    recorder.complete(token)
    now_s = time.monotonic()
    seen = [observe(shm, rank=rank, pid=os.getpid(), started_s=0.0) for rank in range(4)]
    assert all(one.ring is not None for one in seen)

    def views(later_s: float) -> list[NodeView]:
        return [  # two nodes, the second of which has another clock
            NodeView(node="a", now_s=now_s + later_s, ranks=seen[:2]),
            NodeView(node="b", now_s=now_s + later_s, ranks=seen[2:], silent_s=0.0, error_s=np.inf),
        ]

    assert analyse(trace_of(views(1.0), world_size=4)) == ()
    (verdict,) = analyse(trace_of(views(9.0), world_size=4))
    assert verdict.syndrome == "non_communication_hang"
    assert (verdict.culprit.ranks, verdict.culprit.nodes) == ((2,), ("b",))
    assert "ranks 0, 1 and 3 have waited 9." in verdict.evidence
    assert "all_reduce #5 of step 5" in verdict.evidence
    excused = [NodeView(node=one.node, now_s=one.now_s, ranks=one.ranks, excused_s=8.5) for one in views(9.0)]
    assert analyse(trace_of(excused, world_size=4)) == ()
    for one in (*recorders, *beats):
        one.close(unlink=True)


def test_nodes_that_are_not_a_whole_job_are_refused() -> None:
    one = Observation(rank=1, pid=1, state="running", started_s=0.0)
    with pytest.raises(DiagnosticsError, match=r"ranks \[0\] are missing"):
        trace_of([NodeView(node="a", now_s=1.0, ranks=[one])], world_size=2)
    zero = replace(one, rank=0)
    with pytest.raises(DiagnosticsError, match="there are 3, some on two nodes"):
        trace_of([NodeView(node="a", now_s=1.0, ranks=[zero, one, one])], world_size=2)
    with pytest.raises(DiagnosticsError, match=r"ranks \[2\] are missing"):
        trace_of([NodeView(node="a", now_s=1.0, ranks=[zero, one])], world_size=3)


def test_a_program_that_waits_for_a_message_names_the_sender() -> None:
    """What torch's flight recorder and the watch of point-to-point operations leave of a pipeline of three ranks."""
    recv = Collective(4, "recv from 1", "", 64, 3, 10.0, None, "p2p 0", 4)
    beat = Beat(0, 1, "program", 3, 10.0, 0.5)
    done = [Collective(one, "all_reduce", "", 64, one, 9.0, 9.1, "0 default_pg", one) for one in range(3)]
    seen = [
        Observation(
            rank=rank,
            pid=1,
            state="running",
            started_s=0.0,
            beat=beat,
            ring=Ring(rank, 1, 64, 4, tuple(done) if rank else (*done, recv), ()),
            idle_s=200.0,
        )
        for rank in range(3)
    ]
    (verdict,) = analyse(trace_of([NodeView(node="a", now_s=300.0, ranks=seen)], world_size=3))
    assert verdict.culprit.ranks == (1,)
    assert "recv from 1" in verdict.evidence


def observations(trace: Trace) -> list[Observation]:
    """The trace of one node, as its watch would see it."""
    calls, job = trace.calls, trace.job
    now_s = float(trace.clocks.now_s[0])
    found = []
    for rank in range(job.world_size):
        rows = np.flatnonzero(calls.rank == rank)
        rows = rows[np.argsort(calls.enter_s[rows], kind="stable")]
        records = tuple(
            Collective(
                seq=at,
                op=calls.ops[int(calls.op[row])],
                label="",
                nbytes=int(calls.nbytes[row]),
                step=int(calls.step[row]),
                entered_s=float(calls.enter_s[row]),
                completed_s=None if np.isnan(calls.done_s[row]) else float(calls.done_s[row]),
                group=job.groups[int(calls.group[row])],
                group_seq=int(calls.seq[row]),
            )
            for at, row in enumerate(rows)
        )
        state = STATES[int(trace.signs.state[rank])].split(" ")[0]
        if trace.signs.state[rank] == DEAD:
            state = "dead"
        beat_s = float(trace.signs.beat_s[rank])
        found.append(
            Observation(
                rank=rank,
                pid=1,
                state="stopped" if trace.signs.state[rank] == STOPPED else state,  # type: ignore[arg-type]
                started_s=now_s - 1e4,
                beat=Beat(rank, 1, str(trace.signs.phase[rank]), int(trace.signs.step[rank]), beat_s, 1.0),
                ring=Ring(rank, 1, 4096, len(records), records, ()),
            )
        )
    return found


@pytest.mark.parametrize("fault", ["stopped rank", "sleep before", "sleep after", "clean", "evaluation of all"])
@pytest.mark.parametrize("seed", [2, 3])
def test_one_node_and_many_are_judged_alike(fault: str, seed: int) -> None:
    case = CASES[fault](seed, Layout(nodes=1, per_node=4, tp=1, pp=1))
    seen = observations(case.trace)
    now_s = float(case.trace.clocks.now_s[0])
    rules = StallRules(floor_s=5.0, factor=3.0, startup_limit_s=600.0, one_node=True)
    alone = {one.rank for one in judge(seen, rules, now_s).culprits if not one.weak}
    said = analyse(trace_of([NodeView(node="a", now_s=now_s, ranks=seen)], world_size=4), rules=Rules(phases=rules))
    assert {rank for one in said if one.confidence != "weak" for rank in one.culprit.ranks} == alone == set(case.ranks)
