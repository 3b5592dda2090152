"""The processes of this node's ranks in one start: which run, which failed and why, and how they are killed."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from outlast.diagnostics.live import process_state
from outlast.launch.failures import RankFailure, is_torn, last_output
from outlast.launch.oom_killer import OomKills
from outlast.launch.orphans import now_ticks

STACK_DUMP_S = 0.3
"""How long a hung rank has to write its stacks, after SIGUSR1 and before SIGKILL."""
REAP_S = 5.0
"""How long a process may take to die of SIGKILL before the agent goes on without it."""
NO_PAUSE_S = 1e-4
"""torchelastic's own pause between two polls: the agent waits by itself, and is woken when a rank ends."""
SETTLE_S = 0.05
"""Once a rank has ended, how long others that end for the same reason have to do so before it is looked who has."""
CLOCK_GRAIN_S = 1.0
"""File times are coarser than the clock: a file written right after the start may seem this much older."""


class RankProcesses:
    """The processes that torchelastic started for this node's ranks.

    Args:
        context: torchelastic's handle on the processes.
        local_ranks: the local rank of each of this node's ranks.
        log_dir: the folder of the trainer's own logs, ``rank_00000.log`` and so on.
        started_at: when they were started, seconds since the epoch.
    """

    def __init__(
        self, context: SubprocessContext, local_ranks: Mapping[int, int], log_dir: Path, started_at: float
    ) -> None:
        self._context = context
        self._local_ranks = dict(local_ranks)
        self._log_dir = log_dir
        self._started_at = started_at - CLOCK_GRAIN_S
        self._oom_kills = OomKills()
        self._gone: dict[int, int] = {}  # process id to when it was first seen to have ended

    def running(self) -> dict[int, int]:
        """Process id of every rank that has not exited."""
        alive = {}
        for rank, process in self._by_rank().items():
            if process.poll() is None:
                alive[rank] = process.pid
            else:
                self._gone.setdefault(process.pid, now_ticks())
        return alive

    def wait(self, limit_s: float) -> None:
        """Wait until a rank ends, and then ``SETTLE_S`` for others that end with it, but no longer than ``limit_s``."""
        until_s = time.monotonic() + limit_s
        with contextlib.ExitStack() as stack:
            ends = select.poll()
            try:
                for pid in self.running().values():
                    handle = os.pidfd_open(pid)
                    stack.callback(os.close, handle)
                    ends.register(handle, select.POLLIN)
            except OSError:  # a kernel without it, or no descriptors left
                time.sleep(limit_s)
                return
            if ends.poll(limit_s * 1e3):
                time.sleep(max(0.0, min(SETTLE_S, until_s - time.monotonic())))

    def sessions(self) -> dict[int, int]:
        """Process id of every rank, and when it was first seen to have ended, as ``find_orphans`` takes them."""
        self.running()
        now = now_ticks()
        return {process.pid: self._gone.get(process.pid, now) for process in self._by_rank().values()}

    def statuses(self) -> dict[int, int | None]:
        """Exit status of every rank, ``-N`` for signal N; None while it runs."""
        return {rank: process.poll() for rank, process in self._by_rank().items()}

    def failures(
        self,
        hang_evidence: Mapping[int, str],
        ended: Mapping[int, int],
        early: Mapping[int, str],
        desync: Mapping[int, str],
    ) -> list[RankFailure]:
        """Ranks that exited with a status other than 0, or too early, the likely cause first.

        Args:
            hang_evidence: of each rank that was killed because it hung.
            ended: the process of each rank that had ended before its wrapper was killed.
            early: where ranks were that exited with status 0 while their peers needed them.
            desync: of each rank that left the common order of collectives, how that is known; it may still be ending.
        """
        failures = []
        for rank, process in self._by_rank().items():
            status = process.poll()
            if not status and rank not in early and rank not in desync:
                continue
            local_rank = self._local_ranks[rank]
            outputs = (self._context.stderrs[local_rank], self._context.stdouts[local_rank])
            logs = [self._log_dir / f"rank_{rank:05d}.log", *(Path(path) for path in outputs if path)]
            message, log = last_output(Path(self._context.error_files[local_rank]), logs, self._started_at)
            failures.append(
                RankFailure(
                    rank=rank,
                    pid=ended.get(rank, process.pid),
                    status=status or 0,
                    message=message,
                    log=log,
                    hang=hang_evidence.get(rank, ""),
                    ended_alone=rank in ended,
                    early=early.get(rank, ""),
                    desync=desync.get(rank, ""),
                    memory="" if rank in hang_evidence else self._oom_kills.describe(status == -signal.SIGKILL),
                )
            )
        return sorted(failures, key=RankFailure.sort_key)

    def remove_torn_error_files(self) -> bool:
        """Remove the incomplete error files of ranks that have exited; returns whether there were any."""
        handlers = self._context.subprocess_handlers.items()
        exited = [self._context.error_files[local] for local, handler in handlers if handler.proc.poll() is not None]
        torn = [Path(path) for path in exited if is_torn(path)]
        for path in torn:
            path.unlink()
        return bool(torn)

    def kill(self, rank: int) -> None:
        """SIGKILL a rank and its children, and wait until it is gone, for at most ``REAP_S``.

        torchelastic makes each rank the leader of a session of its own, so one signal reaches all of them.
        """
        process = self._by_rank()[rank]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(REAP_S)

    def kill_all(self) -> None:
        """SIGKILL all ranks and their children, and wait until they are gone, for at most ``REAP_S``."""
        running = self._by_rank().values()
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        deadline_s = time.monotonic() + REAP_S
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline_s - time.monotonic()))

    def kill_stopped(self) -> None:
        """SIGKILL the ranks that are stopped; they would not notice SIGTERM until they are continued."""
        for rank, pid in self.running().items():
            if process_state(pid) == "stopped":
                self.kill(rank)

    def end(self, at_once: Iterable[int], grace_s: float) -> None:
        """End all ranks: SIGKILL ``at_once`` and stopped ones; SIGTERM the others, and SIGKILL after ``grace_s``."""
        for rank in at_once:
            self.kill(rank)
        self.kill_stopped()
        self._context.close(signal.SIGTERM, int(grace_s))

    def _by_rank(self) -> dict[int, subprocess.Popen[bytes]]:
        handlers = self._context.subprocess_handlers
        return {rank: handlers[local].proc for rank, local in self._local_ranks.items() if local in handlers}


def dump_stacks(pid: int) -> None:
    """Have a running process write the stacks of its threads to its log, if it has a handler for SIGUSR1."""
    if process_state(pid) == "running" and _handles(pid, signal.SIGUSR1):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
        time.sleep(STACK_DUMP_S)


def _handles(pid: int, signum: signal.Signals) -> bool:
    """Whether a process has a handler for a signal; SIGUSR1 kills a process that has none."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (signum - 1) & 1)
