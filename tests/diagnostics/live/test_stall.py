from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.diagnostics import (
    Heartbeat,
    Recorder,
)
from outlast.diagnostics.live import (
    Beat,
    Collective,
    Observation,
    Ring,
    StallRules,
    heartbeat_path,
    judge,
    observe,
    process_state,
    ring_path,
)
from outlast.diagnostics.live.stall import ProcessState
from tests.diagnostics.conftest import Spawn

RULES = StallRules(floor_s=10.0, factor=5.0, startup_limit_s=600.0)
NOW_S = 1000.0

RANK = """
import sys, time
from pathlib import Path
from outlast.diagnostics.live import Heartbeat, Recorder, heartbeat_path, ring_path
shm, rank, hang = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
heartbeat = Heartbeat(heartbeat_path(shm, rank), rank=rank)
recorder = Recorder(ring_path(shm, rank), rank=rank)
for step in range(1, 36):
    recorder.step = step
    heartbeat.beat("step", step)
    for _ in range(4):
        recorder.complete(recorder.enter("all_gather", 1000, "bucket"))
if hang == "inside":
    recorder.enter("all_gather", 1000, "bucket")
print("ready", flush=True)
time.sleep(600)
"""


def rank(
    number: int,
    *,
    silent_s: float,
    inside: bool = False,
    entered: int = 100,
    step: int = 35,
    phase: str = "step",
    median_step_s: float = 0.3,
    state: ProcessState = "running",
) -> Observation:
    """A rank that has entered ``entered`` collectives, and is still inside the last one or not."""
    since_s = NOW_S - silent_s
    records = tuple(
        Collective(
            seq=seq,
            op="all_gather",
            label="bucket",
            nbytes=1000,
            step=step,
            entered_s=since_s,
            completed_s=None if inside and seq == entered - 1 else since_s,
        )
        for seq in range(max(0, entered - 8), entered)
    )
    return Observation(
        rank=number,
        pid=4000 + number,
        state=state,
        started_s=0.0,
        beat=Beat(number, 4000 + number, phase, step, since_s, median_step_s),
        ring=Ring(number, 4000 + number, 4096, entered, records, ()),
    )


class TestLimit:
    def test_it_follows_the_median_step_above_a_floor(self) -> None:
        assert rank(0, silent_s=0).limit_s(RULES) == 10.0
        assert rank(0, silent_s=0, median_step_s=4.0).limit_s(RULES) == 20.0

    @pytest.mark.parametrize("phase", ["setup", "eval", "data", "checkpoint", "finish"])
    def test_slow_phases_have_the_startup_limit(self, phase: str) -> None:
        assert rank(0, silent_s=0, phase=phase).limit_s(RULES) == 600.0

    def test_so_has_a_rank_whose_steps_are_not_known_yet(self) -> None:
        assert rank(0, silent_s=0, median_step_s=0.0).limit_s(RULES) == 600.0
        silent = Observation(rank=0, pid=1, state="running", started_s=NOW_S - 50)
        assert silent.limit_s(RULES) == 600.0
        assert silent.silent_s(NOW_S) == 50.0


class TestJudge:
    @given(st.lists(st.tuples(st.floats(0, 9.9), st.booleans(), st.integers(90, 110)), min_size=1, max_size=8))
    def test_nobody_is_named_while_everybody_beats_in_time(self, ranks: list[tuple[float, bool, int]]) -> None:
        seen = [rank(n, silent_s=s, inside=i, entered=e) for n, (s, i, e) in enumerate(ranks)]
        verdict = judge(seen, RULES, NOW_S)
        assert verdict.silent == ()
        assert verdict.culprits == ()

    def test_a_stopped_process_is_the_culprit_and_the_evidence_says_why(self) -> None:
        seen = [rank(n, silent_s=10.5, inside=True, entered=1236) for n in (0, 1, 3)]
        seen.append(rank(2, silent_s=10.6, entered=1235, state="stopped"))
        verdict = judge(seen, RULES, NOW_S)
        (culprit,) = verdict.culprits
        assert sorted(verdict.silent) == [0, 1, 2, 3]
        assert (culprit.rank, culprit.pid, culprit.step, culprit.weak) == (2, 4002, 35, False)
        assert culprit.evidence == (
            "stopped (state T), last entered all_gather #1234 in step 35, completed; "
            "3 peers have been waiting 10.5 s in all_gather #1235"
        )

    def test_a_stopped_rank_in_a_slow_phase_is_named_for_its_peers_sake(self) -> None:
        seen = [rank(0, silent_s=11, inside=True), rank(1, silent_s=11, phase="checkpoint", state="stopped")]
        assert [one.rank for one in judge(seen, RULES, NOW_S).culprits] == [1]

    def test_a_rank_that_never_entered_what_its_peers_wait_in(self) -> None:
        seen = [rank(0, silent_s=11, inside=True, entered=101), rank(1, silent_s=11, entered=100)]
        (culprit,) = judge(seen, RULES, NOW_S).culprits
        assert culprit.rank == 1
        assert not culprit.weak
        assert "running, silent for 11.0 s in phase step of step 35" in culprit.evidence
        assert "1 peer has been waiting 11.0 s in all_gather #100" in culprit.evidence

    def test_waiting_for_a_rank_within_its_own_limit_blames_nobody(self) -> None:
        seen = [rank(0, silent_s=500, inside=True), rank(1, silent_s=500, phase="checkpoint")]
        verdict = judge(seen, RULES, NOW_S)
        assert verdict.silent == (0,)
        assert verdict.culprits == ()

    def test_a_single_rank_that_hangs_outside_collectives(self) -> None:
        assert judge([rank(0, silent_s=89)], RULES, NOW_S).culprits == ()
        (culprit,) = judge([rank(0, silent_s=91)], RULES, NOW_S).culprits
        assert not culprit.weak

    def test_all_silent_and_none_waiting_names_the_one_behind(self) -> None:
        seen = [rank(0, silent_s=91, step=35, entered=100), rank(1, silent_s=92, step=34, entered=96)]
        assert [one.rank for one in judge(seen, RULES, NOW_S).culprits] == [1]

    def test_what_all_do_at_once_is_a_phase(self) -> None:
        together = [rank(0, silent_s=60), rank(1, silent_s=60), rank(2, silent_s=60)]
        verdict = judge(together, RULES, NOW_S)
        assert (verdict.silent, verdict.culprits) == ((0, 1, 2), ())

    @pytest.mark.parametrize("phase", ["eval", "data"])
    def test_a_rank_alone_in_a_phase_has_less_time_than_all_together(self, phase: str) -> None:
        together = [rank(0, silent_s=500, phase=phase), rank(1, silent_s=500, phase=phase)]
        assert judge(together, RULES, NOW_S).silent == ()
        late = rank(1, silent_s=500, phase=phase)
        assert judge([rank(0, silent_s=40, phase=phase, inside=True), late], RULES, NOW_S).culprits == ()
        (culprit,) = judge([rank(0, silent_s=61, phase=phase, inside=True), late], RULES, NOW_S).culprits
        assert (culprit.rank, culprit.limit_s, culprit.weak) == (1, 60.0, False)

    def test_who_has_only_just_entered_waits_for_nobody(self) -> None:
        """As a rank does that was stopped, and continued a moment ago."""
        back = rank(1, silent_s=0.0, inside=True, entered=101)
        assert judge([rank(0, silent_s=11), back], RULES, NOW_S).culprits == ()

    def test_a_rank_that_was_stopped_a_moment_ago_is_not_to_blame(self) -> None:
        seen = [rank(0, silent_s=25, inside=True), rank(1, silent_s=0.5, state="stopped")]
        assert judge(seen, RULES, NOW_S).culprits == ()

    def test_a_dead_process_does_not_hang(self) -> None:
        seen = [rank(0, silent_s=700, state="dead"), rank(1, silent_s=9, inside=True)]
        assert judge(seen, RULES, NOW_S).silent == ()

    def test_time_that_does_not_count(self) -> None:
        suspended = [replace(rank(n, silent_s=25, inside=n == 0), excused_s=20.0) for n in (0, 1)]
        assert judge(suspended, RULES, NOW_S).silent == ()
        assert judge(suspended, RULES, NOW_S + 6).culprits[0].rank == 1

    def test_all_inside_is_weak_evidence_and_needs_patience(self) -> None:
        def seen(silent_s: float) -> list[Observation]:
            return [
                rank(0, silent_s=silent_s, inside=True, entered=101),
                rank(1, silent_s=silent_s, inside=True, entered=100),
                rank(2, silent_s=silent_s, inside=True, entered=101),
            ]

        assert judge(seen(29), RULES, NOW_S).silent == (0, 1, 2)
        assert judge(seen(29), RULES, NOW_S).culprits == ()
        (culprit,) = judge(seen(31), RULES, NOW_S).culprits
        assert culprit.rank == 1
        assert culprit.weak
        assert "inside all_gather #99 of step 35 for 31.0 s" in culprit.evidence
        assert "weak evidence" in culprit.evidence

    def test_a_rank_that_never_gave_a_sign_of_life(self) -> None:
        mute = Observation(rank=1, pid=9, state="running", started_s=NOW_S - 601)
        (culprit,) = judge([rank(0, silent_s=1), mute], RULES, NOW_S + 30).culprits[:1]
        assert culprit.rank == 1
        assert "no heartbeat 631.0 s after its start" in culprit.evidence


class TestRealProcesses:
    def test_a_process_is_running_stopped_or_dead(self, spawn: Spawn) -> None:
        process = spawn("import time; print('ready', flush=True); time.sleep(600)")
        assert process.stdout is not None
        process.stdout.readline()
        assert process_state(process.pid) == "running"
        process.send_signal(signal.SIGSTOP)
        assert self.until(process.pid, "stopped")
        process.send_signal(signal.SIGCONT)
        assert self.until(process.pid, "running")
        process.kill()
        assert self.until(process.pid, "dead")  # a zombie, until it is waited for
        process.wait(timeout=30)
        assert process_state(process.pid) == "dead"

    @staticmethod
    def until(pid: int, state: str) -> bool:
        deadline = time.monotonic() + 60
        while process_state(pid) != state and time.monotonic() < deadline:
            time.sleep(0.01)
        return process_state(pid) == state

    @pytest.mark.parametrize(("how", "words"), [("stop", "stopped (state T)"), ("outside", "running, silent for")])
    def test_the_hung_one_of_two_ranks_is_found(self, shm: Path, spawn: Spawn, how: str, words: str) -> None:
        started_s = time.monotonic()
        ranks = [spawn(RANK, shm, 0, "inside"), spawn(RANK, shm, 1, "outside")]
        for process in ranks:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        if how == "stop":
            ranks[1].send_signal(signal.SIGSTOP)
            assert self.until(ranks[1].pid, "stopped")
        rules = StallRules(floor_s=0.2, factor=5.0, startup_limit_s=60.0)
        deadline = time.monotonic() + 60
        while True:
            seen = [observe(shm, rank=n, pid=ranks[n].pid, started_s=started_s) for n in (0, 1)]
            verdict = judge(seen, rules, time.monotonic())
            if verdict.culprits or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        (culprit,) = verdict.culprits
        assert (culprit.rank, culprit.pid, culprit.step) == (1, ranks[1].pid, 35)
        assert culprit.evidence.startswith(words)
        assert "last entered all_gather #139 in step 35, completed" in culprit.evidence
        assert "in all_gather #140" in culprit.evidence

    def test_what_an_earlier_process_left_is_not_taken_for_the_new_one(self, shm: Path) -> None:
        heartbeat = Heartbeat(heartbeat_path(shm, 0), rank=0)
        recorder = Recorder(ring_path(shm, 0), rank=0)
        recorder.enter("all_reduce", 1, "x")
        before = observe(shm, rank=0, pid=os.getpid(), started_s=0.0)
        assert before.beat is not None
        assert len(before.pending) == 1
        after = observe(shm, rank=0, pid=os.getpid(), started_s=time.monotonic())
        assert after.beat is None
        assert after.ring is None
        heartbeat.close()
        recorder.close()
