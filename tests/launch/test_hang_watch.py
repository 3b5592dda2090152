"""Whom the watch names, by heartbeats and rings that real processes leave in shared memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from outlast.diagnostics.live import process_state
from outlast.launch import LaunchConfig
from outlast.launch.hang_watch import HangWatch
from tests.helpers import wait_for

RULES = LaunchConfig(hang_floor_s=0.4, together_limit_s=0.8, startup_limit_s=1.6, patience=2.0)
LIVE = """
import sys, time
from pathlib import Path
from outlast.diagnostics.live import Heartbeat, Recorder, heartbeat_path, ring_path
shm, rank, phase, inside = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
heartbeat = Heartbeat(heartbeat_path(shm, rank), rank=rank)
recorder = Recorder(ring_path(shm, rank), rank=rank, capacity=16)
for step in range(1, 6):
    heartbeat.beat("step", step)
if inside == "inside":
    recorder.enter("all_reduce", 4, "x")
heartbeat.beat(phase, 5)
print("ready", flush=True)
time.sleep(60)
"""


class Ranks:
    """Processes that went silent in a given phase, inside a collective or not."""

    def __init__(self, watch: HangWatch, root: Path) -> None:
        self.watch = watch
        self.root = root
        self.processes: dict[int, subprocess.Popen[str]] = {}

    def start(self, *phases: str) -> dict[int, int]:
        self.watch.begin(tuple(range(len(phases))))
        for rank, phase in enumerate(phases):
            name, _, inside = phase.partition(" ")
            self.processes[rank] = subprocess.Popen(
                [sys.executable, "-c", LIVE, str(self.watch.shm_dir), str(rank), name, inside],
                stdout=subprocess.PIPE,
                text=True,
                cwd=self.root,
            )
        for process in self.processes.values():
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        return {rank: process.pid for rank, process in self.processes.items()}

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.communicate()
        self.watch.close(tuple(self.processes))


@pytest.fixture
def ranks(tmp_path: Path, root: Path) -> Iterator[Ranks]:
    made = Ranks(HangWatch(tmp_path, RULES), root)
    yield made
    made.end()


def test_a_stopped_rank_is_named_even_in_a_slow_phase(ranks: Ranks) -> None:
    pids = ranks.start("checkpoint")
    os.kill(pids[0], signal.SIGSTOP)
    (culprit,) = wait_for(lambda: ranks.watch.find_hung(pids, alone=True))
    assert (culprit.rank, culprit.pid, culprit.limit_s) == (0, pids[0], 0.4), "the limit of a step, not of a checkpoint"
    assert "stopped" in culprit.evidence


def test_who_waits_is_not_blamed_while_a_peer_writes_a_checkpoint(ranks: Ranks) -> None:
    pids = ranks.start("step inside", "checkpoint")
    (culprit,) = wait_for(lambda: ranks.watch.find_hung(pids, alone=True))
    assert (culprit.rank, culprit.limit_s, culprit.weak) == (1, 1.6, False)


def test_when_all_wait_the_launcher_is_patient(ranks: Ranks) -> None:
    pids = ranks.start("step inside", "step inside")
    culprits = wait_for(lambda: ranks.watch.find_hung(pids, alone=True))
    assert all(one.weak and one.silent_s > 0.8 for one in culprits)
    assert not any("node" in one.evidence for one in culprits)


def test_when_all_wait_for_other_nodes_it_is_more_so(ranks: Ranks) -> None:
    pids = ranks.start("step inside")
    (culprit,) = wait_for(lambda: ranks.watch.find_hung(pids, alone=False))
    assert culprit.weak
    assert culprit.silent_s > 1.6


def test_what_an_earlier_start_left_counts_for_nothing(ranks: Ranks) -> None:
    pids = ranks.start("step")
    heartbeat = next(ranks.watch.shm_dir.glob("heartbeat_*"))
    old = heartbeat.read_bytes()
    ranks.watch.begin((0,))
    assert not heartbeat.exists()
    heartbeat.write_bytes(old)  # as if a rank of another launcher had left it
    (culprit,) = wait_for(lambda: ranks.watch.find_hung(pids, alone=True))
    assert "no heartbeat" in culprit.evidence
    assert culprit.limit_s == 1.6


def test_the_folder_goes_with_its_last_rank(ranks: Ranks) -> None:
    ranks.start("step", "step")
    ranks.watch.close((0,))
    assert ranks.watch.shm_dir.exists()
    ranks.watch.close((1,))
    assert not ranks.watch.shm_dir.exists()
    ranks.watch.close((1,))


@pytest.mark.parametrize("phase", ["eval", "data", "step"])
def test_what_all_ranks_do_at_once_is_a_phase(tmp_path: Path, root: Path, phase: str) -> None:
    rules = replace(RULES, startup_limit_s=60.0, together_limit_s=60.0)
    ranks = Ranks(HangWatch(tmp_path, rules), root)
    try:
        pids = ranks.start(phase, phase)
        both = f"rank 0 in phase {phase} of step 5, rank 1 in phase {phase}"
        wait_for(lambda: (ranks.watch.find_hung(pids, alone=True), both in ranks.watch.waiting)[1])
        said = ranks.watch.waiting
        assert said.startswith("no progress for ")
        assert "waiting up to 60 s" in said
    finally:
        ranks.end()


def test_a_rank_that_its_peers_wait_for_in_a_phase(tmp_path: Path, root: Path) -> None:
    ranks = Ranks(HangWatch(tmp_path, replace(RULES, startup_limit_s=60.0, alone_limit_s=0.6)), root)
    try:
        pids = ranks.start("step inside", "data")
        (culprit,) = wait_for(lambda: ranks.watch.find_hung(pids, alone=True))
        assert (culprit.rank, culprit.limit_s) == (1, 0.6)
    finally:
        ranks.end()


def test_time_in_which_the_watch_did_not_run_is_no_silence(tmp_path: Path, root: Path) -> None:
    """As where launcher and ranks are stopped and continued, or the machine is."""
    ranks = Ranks(HangWatch(tmp_path, replace(RULES, hang_floor_s=3.0)), root)
    try:
        pids = ranks.start("step inside", "step")
        ranks.watch.find_hung(pids, alone=True)
        began_s = time.monotonic()
        time.sleep(6.0)  # twice the limit
        ranks.watch.find_hung(pids, alone=True)
        assert _silence_s(ranks, pids) < time.monotonic() - began_s - 4.0
        (culprit,) = wait_for(lambda: ranks.watch.find_hung(pids, alone=True))
        assert culprit.rank == 1
        assert culprit.silent_s < time.monotonic() - began_s - 4.0, "what was lost is not counted later either"
    finally:
        ranks.end()


def test_a_rank_that_was_stopped_and_continued_gets_its_time_again(ranks: Ranks) -> None:
    pids = ranks.start("step inside", "step")
    os.kill(pids[1], signal.SIGSTOP)
    wait_for(lambda: process_state(pids[1]) == "stopped")
    ranks.watch.find_hung(pids, alone=True)
    before = _silence_s(ranks, pids)
    os.kill(pids[1], signal.SIGCONT)
    wait_for(lambda: process_state(pids[1]) == "running")
    assert _silence_s(ranks, pids) < before + 0.4


def test_who_moves_between_two_looks_is_spared(ranks: Ranks) -> None:
    """Rank 1 is continued just after the limit: the second look sees it run."""
    pids = ranks.start("step inside", "step")
    os.kill(pids[1], signal.SIGSTOP)
    wait_for(lambda: process_state(pids[1]) == "stopped")
    wait_for(lambda: any(one.rank == 1 for one in ranks.watch._judge(pids, True)[1]))
    waker = threading.Timer(0.05, os.kill, (pids[1], signal.SIGCONT))
    ranks.watch._recheck_s = 2.0
    waker.start()
    assert ranks.watch.find_hung(pids, alone=True) == ()
    waker.join()


@pytest.mark.parametrize("alone", [True, False])
def test_a_node_with_one_rank_sees_nobody_wait(ranks: Ranks, alone: bool) -> None:
    """A hang outside collectives looks like slow storage, so that it gets the time that all ranks may take together."""
    pids = ranks.start("step")
    (culprit,) = wait_for(lambda: ranks.watch.find_hung(pids, alone=alone))
    assert (culprit.rank, culprit.weak) == (0, False)
    assert culprit.silent_s > RULES.together_limit_s


def test_a_process_that_has_ended_does_not_hang(ranks: Ranks) -> None:
    pids = ranks.start("step", "step inside")
    ranks.watch.find_hung(pids, alone=True)
    ranks.processes[0].kill()
    ended = wait_for(lambda: (ranks.watch.find_hung(pids, alone=True), ranks.watch.ended)[1])
    assert ended == {0: pids[0]}


def _silence_s(ranks: Ranks, pids: dict[int, int]) -> float:
    """How long rank 1 counts as silent."""
    return ranks.watch.observe(pids)[1].silent_s(time.monotonic())
