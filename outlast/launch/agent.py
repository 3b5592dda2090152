"""torchelastic's local agent, with a look at the ranks' heartbeats before each of its own looks at their processes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from outlast.diagnostics.live import (
    Culprit,
    process_state,
)
from outlast.events import EventLog, HangFound, WorkersFailed, WorkersStarted
from outlast.launch.config import LaunchConfig
from outlast.launch.failures import NO_RESTART_STATUS, RankFailure, is_torn, last_words
from outlast.launch.hang_watch import HangWatch
from outlast.launch.place import requeues
from outlast.launch.rank_output import RankOutput

STACK_DUMP_S = 0.3
"""How long a hung rank has to write its stacks, after SIGUSR1 and before SIGKILL."""
STARTS = "outlast/starts"
REAP_S = 5.0
"""How long a process may take to die of SIGKILL before the agent goes on without it."""

log = logging.getLogger("outlast.launch")


class WatchedAgent(LocalElasticAgent):
    """A LocalElasticAgent that also ends ranks which make no progress.

    torchelastic starts, supervises, stops and restarts the processes; this class adds to its hooks:

    - before each look at the processes it asks the :class:`~outlast.launch.hang_watch.HangWatch` and kills who
      hangs, which torchelastic then sees as a failed process;
    - where a rank failed, it first kills those of its peers that cannot react to SIGTERM (stopped, or inside a
      collective that will never end), and gives the others ``stop_grace_s`` in place of torchelastic's 30 s;
    - each round of the rendezvous gets a fresh store for its ranks;
    - it writes down what happened.

    Args:
        spec: torchelastic's.
        output: where the ranks' output goes.
        config: of the launcher.
        run_dir: the run's directory.
        events: where events are written; its generation is kept at that of the ranks.
        host: this node's name in events.
    """

    def __init__(
        self, spec: WorkerSpec, output: RankOutput, config: LaunchConfig, run_dir: Path, events: EventLog, host: str
    ) -> None:
        super().__init__(
            spec,
            output,
            exit_barrier_timeout=config.exit_barrier_s,
            shutdown_timeout=int(config.stop_grace_s),
            log_line_prefix_template="[rank ${rank}] ",
        )
        self.failures: list[RankFailure] = []
        """Ranks that failed in the newest failure, root causes only."""
        self.restarts = 0
        """Failures that led to a restart so far."""
        self._config = config
        self._output = output
        self._run_dir = run_dir
        self._events = events
        self._host = host
        self._watch = HangWatch(run_dir, config) if config.watch else None
        self._hung: dict[int, Culprit] = {}
        self._started_at = time.time()
        self._requeues = requeues(os.environ)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """Meet the other nodes, with a store for the ranks that nothing was written to before.

        torchelastic keeps the store of the first round, and ranks that are started again read in it the addresses of
        their dead predecessors: gloo then fails with "Connection refused". The old ranks have ended by now.
        """
        handler = worker_group.spec.rdzv_handler
        if isinstance(handler, DynamicRendezvousHandler):
            handler._bootstrap_store_info = None
            handler._shared_tcp_store_server = None
        super()._rendezvous(worker_group)
        self._output.generation = self._requeues + self._agree_on_starts(worker_group)

    def _agree_on_starts(self, worker_group: WorkerGroup) -> int:
        """How often ranks of this job were started before: counted in the store that outlives a round, by the first
        node of the round, and told to the others through the round's own store."""
        store = worker_group.store
        assert isinstance(store, dist.PrefixStore)  # type: ignore[attr-defined]
        if worker_group.group_rank == 0:
            store.set(STARTS, str(store.underlying_store.add(STARTS, 1) - 1))
        return int(store.get(STARTS))

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        ranks = self.ranks
        if self._watch is not None:
            self._watch.begin(ranks)
        self._hung = {}
        self._started_at = time.time() - 1.0  # file times are coarser than clocks
        pids: dict[int, Any] = super()._start_workers(worker_group)
        self.restarts = worker_group.spec.max_restarts - self._remaining_restarts
        self._events.generation = self._output.generation
        self._events.write(
            WorkersStarted(
                host=self._host,
                ranks=ranks,
                pids=tuple(pids[worker.local_rank] for worker in worker_group.workers),
                restarts_left=self._remaining_restarts,
            )
        )
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._watch is not None:
            for culprit in self._watch.look(self._running(), alone=worker_group.group_world_size == 1):
                self._end_hung(culprit)
        self.failures = self._failed()
        undying = [one for one in self._hung if one in self._running()]
        if self.failures or undying:
            self._end_peers()
        if undying:  # in an uninterruptible sleep: it must not keep the others from going on
            log.error("outlast: ranks %s do not die of SIGKILL; going on without them", undying)
            result = RunResult(state=WorkerState.UNHEALTHY)
        else:
            result = self._ask_torchelastic(worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            self._write_failure(result)
        return result

    def _ask_torchelastic(self, worker_group: WorkerGroup) -> RunResult:
        """Its own look at the processes. A rank that is killed while it writes its error file leaves half of it, which
        torchelastic cannot read, and would end the launcher: such a file goes, and the rank's log has to tell."""
        self._drop_torn()
        while True:
            try:
                result: RunResult = super()._monitor_workers(worker_group)
            except json.JSONDecodeError:  # one that ended just now
                if not self._drop_torn():
                    raise
            else:
                return result

    def _drop_torn(self) -> bool:
        """Remove the error files of ended ranks that are not whole; whether there were any."""
        context = self._pcontext
        if not isinstance(context, SubprocessContext):
            return False
        handlers = context.subprocess_handlers.items()
        ended = [context.error_files[local] for local, handler in handlers if handler.proc.poll() is not None]
        torn = [Path(path) for path in ended if is_torn(path)]
        for path in torn:
            path.unlink()
        return bool(torn)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """End all ranks: those that are stopped at once, the others with SIGTERM and, after ``stop_grace_s``, SIGKILL.

        SIGTERM whatever ended the launcher: a rank that gets SIGINT prints a KeyboardInterrupt's traceback.
        """
        self._kill_stopped()
        super()._shutdown(signal.SIGTERM, min(timeout, int(self._config.stop_grace_s)))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of this node in the newest start."""
        return tuple(worker.global_rank for worker in self._worker_group.workers)

    def tidy(self) -> None:
        """Remove what the ranks left in shared memory. Not for after a failure: it tells what they were doing."""
        if self._watch is not None:
            self._watch.close(self.ranks)

    def _processes(self) -> dict[int, subprocess.Popen[bytes]]:
        """The processes by rank."""
        context = self._pcontext
        if not isinstance(context, SubprocessContext):
            return {}
        local = {worker.local_rank: worker.global_rank for worker in self._worker_group.workers}
        return {local[local_rank]: handler.proc for local_rank, handler in context.subprocess_handlers.items()}

    def _running(self) -> dict[int, int]:
        """Process ids of ranks that have not ended."""
        return {rank: process.pid for rank, process in self._processes().items() if process.poll() is None}

    def _failed(self) -> list[RankFailure]:
        """Ranks that ended badly, the likely cause first."""
        failures = []
        by_rank = {worker.global_rank: worker.local_rank for worker in self._worker_group.workers}
        for rank, process in self._processes().items():
            status = process.poll()
            if not status:
                continue
            name = f"rank_{rank:05d}"
            context = self._pcontext
            assert context is not None
            local_rank = by_rank[rank]
            logs = [self._run_dir / "attempts" / "latest" / "logs" / f"{name}.log"]
            logs += [Path(path) for path in (context.stderrs[local_rank], context.stdouts[local_rank]) if path]
            said, found = last_words(Path(context.error_files[local_rank]), logs, self._started_at)
            hang = self._hung[rank].evidence if rank in self._hung else ""
            failures.append(RankFailure(rank=rank, pid=process.pid, status=status, said=said, log=found, hang=hang))
        return sorted(failures, key=RankFailure.order)

    def _end_hung(self, culprit: Culprit) -> None:
        """Have a hung rank write its stacks, then kill it and wait until it is gone."""
        if culprit.rank in self._hung:
            return
        self._hung[culprit.rank] = culprit
        if process_state(culprit.pid) == "running" and _catches(culprit.pid, signal.SIGUSR1):
            with contextlib.suppress(ProcessLookupError):
                os.kill(culprit.pid, signal.SIGUSR1)
            time.sleep(STACK_DUMP_S)
        log.error(
            "outlast: rank %d hangs at step %d (silent for %.1f s, limit %.1f s): %s; killing it",
            culprit.rank,
            culprit.step,
            culprit.silent_s,
            culprit.limit_s,
            culprit.evidence,
        )
        self._events.write(
            HangFound(
                culprit=culprit.rank,
                pid=culprit.pid,
                step=culprit.step,
                silent_s=culprit.silent_s,
                limit_s=culprit.limit_s,
                evidence=culprit.evidence,
            )
        )
        self._kill(culprit.rank)

    def _end_peers(self) -> None:
        """A rank failed: end the others, without waiting for those that cannot react."""
        if self._watch is not None:
            for one in self._watch.see(self._running()):
                if one.pending:
                    self._kill(one.rank)
        self._kill_stopped()
        if self._pcontext is not None:
            self._pcontext.close(signal.SIGTERM, int(self._config.stop_grace_s))

    def _kill_stopped(self) -> None:
        """SIGKILL those who are stopped; they would notice SIGTERM only when continued."""
        for rank, pid in self._running().items():
            if process_state(pid) == "stopped":
                self._kill(rank)

    def _kill(self, rank: int) -> None:
        """SIGKILL to a rank and its children: torchelastic makes each rank the leader of a session of its own."""
        process = self._processes()[rank]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(REAP_S)

    def _write_failure(self, result: RunResult) -> None:
        if not self.failures:  # between our look at the processes and torchelastic's
            self.failures = [
                RankFailure(rank=rank, pid=one.pid, status=one.exitcode)
                for rank, one in sorted(result.failures.items())
            ]
        if any(one.status == NO_RESTART_STATUS for one in self.failures):
            self._remaining_restarts = 0
        restarting = self._remaining_restarts > 0
        for one in (one for one in self.failures if not one.hang):
            log.error("outlast: rank %d (pid %d) %s", one.rank, one.pid, one.reason)
        if restarting:
            log.warning("outlast: starting the ranks again; %d restarts left after this", self._remaining_restarts - 1)
        self._events.write(
            WorkersFailed(
                host=self._host,
                ranks=tuple(one.rank for one in self.failures),
                reasons=tuple(one.reason for one in self.failures),
                restarting=restarting,
            )
        )


def _catches(pid: int, signum: signal.Signals) -> bool:
    """Whether a process has a handler for a signal: SIGUSR1 would end one that has none, and leave no stacks."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (signum - 1) & 1)
