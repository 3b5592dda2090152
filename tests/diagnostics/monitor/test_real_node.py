"""Real processes on this machine: throttled, crowded, stopped, busy without progress; and real lines of its kernel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from outlast.diagnostics.live import clear, shm_directory
from outlast.diagnostics.monitor import NodeCondition, NodeMonitor
from tests.cpu_quota import quota_group
from tests.helpers import wait_for

RANK = """
import sys, time
from pathlib import Path
from outlast.diagnostics.live import Heartbeat, Recorder, heartbeat_path, ring_path
shm, rank, work = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
heartbeat = Heartbeat(heartbeat_path(shm, rank), rank=rank)
recorder = Recorder(ring_path(shm, rank), rank=rank, capacity=16)
step = 0
while True:
    step += 1
    heartbeat.beat("step", step)
    if work == "hold" and step == 8:
        while True:
            pass
    if work == "wait" and step == 8:
        recorder.enter("all_reduce", 4, "x")
        while True:
            pass
    end = time.perf_counter() + 0.01
    while time.perf_counter() < end:
        pass
    if work == "idle":
        time.sleep(0.05)
"""
BUSY = "while True: pass"


class Node:
    """Processes that are this node's ranks, and others, and the monitor that watches them."""

    def __init__(self, run: Path, root: Path) -> None:
        self.shm = shm_directory(run)
        self.told: list[NodeCondition] = []
        self.monitor = NodeMonitor("a", self.shm, self.told.append, interval_s=0.25, quiet_s=0.5)
        self.pids: dict[int, int] = {}
        self._root = root
        self._processes: list[subprocess.Popen[bytes]] = []

    def run(self, *words: str, core: int | None = None) -> int:
        """Start a Python program, on one core if asked."""
        process = subprocess.Popen([sys.executable, "-c", *words], cwd=self._root)
        self._processes.append(process)
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        return process.pid

    def ranks(self, *works: str, core: int | None = None) -> None:
        for rank, work in enumerate(works):
            self.pids[rank] = self.run(RANK, str(self.shm), str(rank), work, core=core)
        self.monitor.watch(self.pids)
        for rank in self.pids:
            self.until(lambda rank=rank: (self.shm / f"heartbeat_{rank:05d}").exists())

    def until(self, what: Callable[[], object], timeout_s: float = 60) -> None:
        """Take samples until something is so."""
        deadline = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < deadline, self.told
            self.monitor.look()
            time.sleep(0.25)

    def of(self, what: str, state: str = "began") -> list[NodeCondition]:
        return [one for one in self.told if (one.what, one.state) == (what, state)]

    def end(self) -> None:
        self.monitor.close()
        for process in self._processes:
            process.kill()
            process.wait()
        clear(self.shm)


@pytest.fixture
def node(tmp_path: Path, root: Path) -> Iterator[Node]:
    made = Node(tmp_path, root)
    yield made
    made.end()


@pytest.mark.root
def test_a_quota_is_seen_while_it_holds_a_rank_back(node: Node) -> None:
    with ExitStack() as stack:
        try:
            # So little that it holds the rank back also where other processes leave it a quarter of a core.
            group = stack.enter_context(quota_group(0.05))
        except OSError as error:
            pytest.skip(f"no CPU cgroup can be made here: {error}")
        node.ranks("compute", "idle")
        procs = group / "cgroup.procs"
        procs.write_text(str(node.pids[0]))
        node.until(lambda: node.of("cpu_throttled"))
        (began,) = node.of("cpu_throttled")
        assert began.ranks == (0,)
        assert group.name in began.words
        assert "0.05 cores" in began.words
        (group.parent / "cgroup.procs").write_text(str(node.pids[0]))
        node.until(lambda: node.of("cpu_throttled", "ended"))
        (ended,) = node.of("cpu_throttled", "ended")
        assert ended.since_t == began.since_t
        assert ended.measured_s is not None
        assert 0.2 * ended.seconds < ended.measured_s <= ended.seconds


@pytest.mark.slow
def test_another_process_on_a_pinned_ranks_core_is_named(node: Node) -> None:
    core = min(os.sched_getaffinity(0))
    # a child of this process would count as one of this launch: the neighbour is adopted by init
    started = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -c "{BUSY}" >/dev/null 2>&1 & echo $!'],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    pid = int(started.stdout)
    try:
        node.ranks("compute", core=core)
        os.sched_setaffinity(pid, {core})
        with suppress(PermissionError):  # so that it is the busiest on a machine where others are at work
            os.setpriority(os.PRIO_PROCESS, pid, 0)
        node.until(lambda: any(f"(pid {pid})" in one.words for one in node.monitor.current()))
        (began,) = node.of("busy_neighbour")
        assert began.ranks == (0,)
        assert "of the core that rank 0 runs on" in began.words
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_stopped_rank_is_told_at_once_and_when_it_goes_on(node: Node) -> None:
    node.ranks("idle", "idle")
    node.monitor.look()
    os.kill(node.pids[1], signal.SIGSTOP)
    node.until(lambda: node.of("stopped"))
    os.kill(node.pids[1], signal.SIGCONT)
    node.until(lambda: node.of("stopped", "ended"))
    assert [one.ranks for one in node.of("stopped")] == [(1,)]


@pytest.mark.slow
def test_who_computes_without_a_heartbeat_is_not_who_waits_busily(node: Node) -> None:
    node.ranks("hold", "wait")
    node.until(lambda: node.of("gil_held"))
    for _ in range(4):
        node.monitor.look()
        time.sleep(0.25)
    assert [one.ranks for one in node.of("gil_held")] == [(0,)], "rank 1 is inside a collective"
    assert "without a heartbeat" in node.of("gil_held")[0].words


def test_a_watcher_that_was_stopped_says_so_and_judges_nobody(node: Node) -> None:
    node.ranks("idle")
    node.monitor.look()
    time.sleep(0.25)
    node.monitor.look()
    time.sleep(1.8)  # as if this process had been stopped; a process cannot stop and continue itself
    node.monitor.look()
    (once,) = node.of("clock_jumped", "once")
    assert once.seconds > 1.0
    assert not node.of("gil_held")


def test_a_rank_that_ends_is_no_longer_watched(node: Node) -> None:
    node.ranks("idle")
    os.kill(node.pids[0], signal.SIGKILL)
    os.waitpid(node.pids[0], 0)
    node.monitor.look()
    assert node.monitor.newest is not None
    assert node.monitor.newest.ranks == ()
    node.monitor.watch({})
    node.monitor.look()


@pytest.mark.root
def test_a_line_of_the_kernel_that_matters_is_told(node: Node) -> None:
    word = uuid.uuid4().hex
    node.monitor.look()
    try:
        Path("/dev/kmsg").write_text(f"outlast test {word}: I/O error, this is only a test\n")
        Path("/dev/kmsg").write_text(f"outlast test {word}: nothing\n")
    except OSError as error:
        pytest.skip(f"/dev/kmsg cannot be written here: {error}")
    node.until(lambda: any(word in one.words for one in node.of("kernel_log", "once")))
    assert all("I/O error" in one.words for one in node.of("kernel_log", "once") if word in one.words)


def test_the_thread_ends_and_says_what_it_cost(node: Node) -> None:
    node.ranks("idle", "idle")
    node.monitor.start()
    wait_for(lambda: node.monitor.newest is not None and node.monitor.newest.seconds > 0)
    told = node.monitor.close()
    assert told.samples >= 2
    assert told.cpu_s > 0
    assert told.cpu_s <= told.samples * told.longest_cpu_s
