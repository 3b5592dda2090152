"""torchelastic's local agent, which also checks the ranks' heartbeats each time it polls their processes."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.utils import store as store_util

from outlast.diagnostics.monitor import facts_of
from outlast.diagnostics.syndromes.step_trace import NodeSteps, RankSteps
from outlast.errors import LaunchError
from outlast.events import EventLog, WorkersFailed, WorkersStarted
from outlast.launch.backoff import Backoff
from outlast.launch.config import LaunchConfig
from outlast.launch.failures import NO_RESTART_STATUS, RankFailure, first_line
from outlast.launch.first_cause import find_failures
from outlast.launch.hang_watch import HangWatch
from outlast.launch.hung_ranks import HungRanks
from outlast.launch.node_trials import NodeTrials
from outlast.launch.node_watch import NodeWatch
from outlast.launch.notice_relay import NoticeRelay
from outlast.launch.notice_spread import NoticeSpread
from outlast.launch.orphans import Guard, end_orphans, find_orphans, shown
from outlast.launch.other_nodes import OtherNodes
from outlast.launch.place import counted_requeues
from outlast.launch.processes import RankProcesses
from outlast.launch.program_runs import ProgramRuns
from outlast.launch.rank_output import RankOutput
from outlast.launch.rounds import Round, agree, forget_store
from outlast.launch.serving_page import ServingPage
from outlast.launch.slow_ranks import SlowRanks
from outlast.launch.standby.keeper import Standbys
from outlast.launch.standstill_probe import StandstillProbe
from outlast.launch.step_watch import StepWatch
from outlast.launch.trusted_rendezvous import run_secret

EXIT_BARRIER = "torchelastic/agent/terminal_state"
"""torchelastic's key, so that its own agents may be among the other nodes."""

log = logging.getLogger("outlast.launch")


class WatchedAgent(LocalElasticAgent):
    """A LocalElasticAgent that also kills ranks which make no progress.

    torchelastic starts, supervises, stops and restarts the processes; this class adds to its hooks:

    - before each poll of the processes, :class:`~outlast.launch.hang_watch.HangWatch` finds hung ranks, which are
      killed; torchelastic then sees a failed process;
    - when a rank has failed, those of its peers that cannot react to SIGTERM (stopped, or inside a collective that will
      never end) are killed first, and the others get ``stop_grace_s`` instead of torchelastic's 30 s;
    - ranks that have saved and ended because of a notice have succeeded;
    - what ranks that failed or were ended have left behind is ended too;
    - the ranks of each rendezvous round get a fresh store;
    - starts, hangs and failures are written as events.

    Args:
        spec: torchelastic's.
        output: where the ranks' output goes.
        config: the launcher's settings.
        run_dir: the run's directory.
        events: where events are written; the agent keeps its generation equal to the ranks'.
        host: this node's name in events.
        relay: passes notices on.
        guard: ends the ranks if this process dies.
        program_runs: numbers the starts of somebody's program; None for a command that does so itself.
        page: is served while this node is the first one.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        output: RankOutput,
        config: LaunchConfig,
        run_dir: Path,
        events: EventLog,
        host: str,
        relay: NoticeRelay,
        guard: Guard,
        program_runs: ProgramRuns | None = None,
        page: ServingPage | None = None,
    ) -> None:
        super().__init__(
            spec,
            output,
            exit_barrier_timeout=config.exit_barrier_s,
            log_line_prefix_template=os.environ.get("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[rank ${rank}] "),
        )
        self.failures: list[RankFailure] = []
        """Ranks that caused the newest failure; ranks that were ended because of it are left out."""
        self.restarts = 0
        """Failures that led to a restart so far."""
        self.untold: list[RankFailure] = []
        """Ranks that had failed when the agent itself failed, and before it could tell."""
        self.joined = False
        """Whether this node has taken part in a round of the rendezvous."""
        self.resumable = False
        """Whether the ranks ended because of a notice, and lost nothing."""
        self._config = config
        self._output = output
        self._run_dir = run_dir
        self._events = events
        self._host = host
        self._relay = relay
        self._guard = guard
        self._standbys = Standbys(config, output)
        self._processes: RankProcesses | None = None
        self._watch = HangWatch(run_dir, config) if config.watch else None
        self._hung = HungRanks(self._watch, events)
        self.node = NodeWatch(run_dir, config, events, host)
        """What this node does to its ranks."""
        self._steps = StepWatch(run_dir, config.monitor_interval_s) if config.tell_slow else None
        self._slow = SlowRanks(events)
        self._trials = NodeTrials(0, 1, run_dir)
        self._notices = NoticeSpread(relay, events, host)
        self._requeues = counted_requeues(os.environ)
        self._program_runs = program_runs
        self._page = page
        self._round: Round | None = None
        self._others: OtherNodes | None = None
        self._backoff = Backoff(config.backoff_s, config.longest_backoff_s)
        self._backoff_s = 0.0
        self._started_s = time.monotonic()

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """Meet the other nodes, with a fresh store for the ranks: the old ones have ended. Collective over agents."""
        self._leave_others()
        forget_store(worker_group.spec.rdzv_handler)
        super()._rendezvous(worker_group)
        self.joined = True
        found = agree(worker_group, requeues=self._requeues, program_runs=self._program_runs)
        self._output.generation = found.generation
        self._output.job = found.job
        self._output.added = found.variables
        self._notices.store = found.notices
        self._round = found
        if self._page is not None:
            self._page.lead(is_first=worker_group.group_rank == 0)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        ranks = self.ranks
        self._hung.begin(ranks)
        self._slow.begin()
        if self._steps is not None:
            self._steps.begin(ranks, self._output.generation)
            self._steps.start()
        started_at, self._started_s = time.time(), time.monotonic()
        self._guard.watch()
        pids: dict[int, Any] = self._standbys.start(super()._start_workers, worker_group)
        self._guard.watch(pids.values())
        assert isinstance(self._pcontext, SubprocessContext)  # as always where the entrypoint is a program
        local_ranks = {worker.global_rank: worker.local_rank for worker in worker_group.workers}
        logs = self._run_dir / "attempts" / "latest" / "logs"
        self._processes = RankProcesses(self._pcontext, local_ranks, logs, started_at)
        self._relay.kill = self._processes.kill_all
        self.node.begin(self._processes.running())
        self._meet_others(worker_group)
        self._relay.install()
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

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        """Restart the ranks, after a wait if they fail again and again; the old ones are ended before it."""
        self._hung.keep_held(self.ranks)
        wait_s, self._backoff_s = self._backoff_s, 0.0
        if wait_s > 0.0:
            self._stop_workers(worker_group)
            time.sleep(wait_s)
        super()._restart_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        processes = self._processes
        assert processes is not None, "torchelastic polls only after a start"
        processes.wait(self._config.monitor_interval_s)
        self._standbys.look()
        self._notices.look()
        others, steps = self._others, () if self._steps is None else self._steps.newest(time.time())
        alone = worker_group.group_world_size == 1
        self._hung.look(processes, alone=alone, accused=others.accused if others is not None else ())
        if others is not None and self._watch is not None:
            hung = self._hung.accused(worker_group.group_rank or 0, self._host)
            still = bool(self._watch.waiting)
            others.look(processes.running(), self._watch.newest, hung, steps, stands_still=still)
        self._tell_slow(worker_group, steps)
        self.failures = self._find_failures(processes)
        if (ended := self._ended_by_notice(processes)) is not None:
            self.failures = []
            return ended
        undying = self._hung.undying(processes)
        if self.failures or undying:
            self._hung.keep_collectives(self.ranks)  # before the peers are ended, which changes what they show
            self._end_peers(processes)
        if undying:  # in an uninterruptible sleep: it must not keep the others from restarting
            log.error("outlast: ranks %s do not die of SIGKILL; going on without them", undying)
            result = RunResult(state=WorkerState.FAILED)
        else:
            result = self._poll(processes, worker_group)
            if result.state == WorkerState.FAILED and (ended := self._ended_by_notice(processes)) is not None:
                return ended  # they have ended since the look above
            if self.failures and result.state == WorkerState.SUCCEEDED:
                result = RunResult(state=WorkerState.FAILED)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            self._write_failure(result, processes)
        return result

    def close(self) -> None:
        """The launcher ends: nothing is looked at any more."""
        self._standbys.close()
        self.node.close()
        if self._steps is not None:
            self._steps.close()

    def _tell_slow(self, worker_group: WorkerGroup, steps: tuple[RankSteps, ...]) -> None:
        """On node 0: say who is slow."""
        if self._steps is None or worker_group.group_rank != 0:
            return
        if (others := self._others) is not None:
            nodes, facts = others.steps()
        else:
            nodes = [NodeSteps(node=self._host, now_s=0.0, ranks=steps)]
            facts = list(facts_of(self.node.current(), node=self._host, t=time.time(), at_s=0.0))
        self._slow.look(
            nodes,
            facts,
            world_size=worker_group.workers[0].world_size,
            trials=self._trials if others is None else others.trials,
            probe=None if others is None else others.probe,
        )

    def _find_failures(self, processes: RankProcesses) -> list[RankFailure]:
        return find_failures(
            processes,
            self._watch,
            hang_evidence=self._hung.evidence,
            ended=self._hung.ended,
            says_finish=self._relay.expected,
            is_program=self._program_runs is not None,
        )

    def _ended_by_notice(self, processes: RankProcesses) -> RunResult | None:
        """The result if ranks have ended because of a notice, and none has failed; None in any other case."""
        statuses = processes.statuses()
        outcome = self._notices.outcome(statuses)
        if outcome == "ending":
            return RunResult(state=WorkerState.HEALTHY)
        if outcome == "saved":
            self.resumable = True
            return RunResult(state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(statuses))
        return None

    def _poll(self, processes: RankProcesses, worker_group: WorkerGroup) -> RunResult:
        """torchelastic's own poll of the processes.

        A rank that is killed while it writes its error file leaves an incomplete one. torchelastic could not read it,
        and would end the launcher; so such files are removed first, and the rank's log has to do.
        """
        processes.remove_torn_error_files()
        while True:
            try:
                result: RunResult = super()._monitor_workers(worker_group)
            except json.JSONDecodeError:  # of a rank that exited just now
                if not processes.remove_torn_error_files():
                    raise
            else:
                return result

    def _meet_others(self, worker_group: WorkerGroup) -> None:
        """Tell the other nodes' launchers of this start's ranks, and hear of theirs."""
        found = self._round
        if found is None or found.store is None or self._watch is None or worker_group.group_rank is None:
            return
        try:
            secret = run_secret(self._run_dir)
        except LaunchError as error:
            log.warning("outlast: nodes do not hear of one another's ranks: %s", error)
            return
        node, nodes = worker_group.group_rank, worker_group.group_world_size or 1
        round_name = f"{found.job}/{found.generation}"
        probe = StandstillProbe(
            found.store,
            secret=secret,
            round_name=round_name,
            node=node,
            nodes=nodes,
            address=worker_group.spec.local_addr or "",
            folder=self._run_dir,
            events=self._events,
        )
        self._others = OtherNodes(
            found.store,
            secret=secret,
            round_name=round_name,
            node=node,
            nodes=nodes,
            world_size=worker_group.workers[0].world_size,
            host=self._host,
            rules=self._watch.rules,
            interval_s=self._config.monitor_interval_s,
            told_after_s=self._config.told_after_s,
            conditions=self.node.current,
            events=self._events,
            probe=probe,
            trials=NodeTrials(node, nodes, self._run_dir),
        )
        self._others.start()

    def _leave_others(self) -> None:
        if self._others is not None:
            self._others.close()
            self._others = None

    def _exit_barrier(self) -> None:
        """Wait for the other nodes' ranks to finish, for at most ``exit_barrier_s``."""
        self._in_exit_barrier = True
        try:
            store_util.barrier(
                store=self._store,
                world_size=self._worker_group.group_world_size or 1,
                key_prefix=EXIT_BARRIER,
                barrier_timeout=self._config.exit_barrier_s,
            )
        except dist.DistError as error:
            log.warning(
                "outlast: this node's ranks have finished, but not all other nodes said so within %g s "
                "(launch.exit_barrier_s): %s",
                self._config.exit_barrier_s,
                first_line(error),
            )
        finally:
            self._in_exit_barrier = False

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """End all ranks: those that are stopped at once, the others with SIGTERM and, after ``stop_grace_s``, SIGKILL.

        Ranks that obey notices take no signal for an order to end, so they get SIGKILL. To the others it is always
        SIGTERM, whatever ended the launcher: a rank that gets SIGINT prints a KeyboardInterrupt's traceback.
        """
        self.node.rest()
        if self._relay.kill is not None:
            self._relay.kill = None
            told = self._relay.notice is not None and not self.resumable
            # A program's own loop may begin unseen.
            watch = self._watch if self._relay.expected else None
            self._relay.loses = told and (watch is None or watch.steps_begun(self.ranks))
        if self._processes is not None:
            if self._worker_group.state == WorkerState.HEALTHY:  # the agent itself fails, and does not poll any more
                self.untold = self._find_failures(self._processes)
            if self._relay.obeyed:
                self._processes.kill_all()
            self._processes.kill_stopped()
        self._slow.begin()
        if self._pcontext is not None:
            self._pcontext.close(signal.SIGTERM, int(self._config.stop_grace_s))
        super()._shutdown(signal.SIGTERM)  # up to torch 2.11 it takes no time limit
        self._end_orphans()
        self._guard.rest()
        self._leave_others()

    def _end_orphans(self) -> None:
        """End what the ranks have left behind; after success it is only told, for it may be meant to go on."""
        mark, sessions = self._output.mark, self._processes.sessions() if self._processes is not None else {}
        if self._worker_group.state == WorkerState.SUCCEEDED:
            if found := find_orphans(mark, sessions):
                log.warning("outlast: the ranks have ended, but not what they started: %s", shown(found))
            return
        ended, left = end_orphans(mark, sessions)
        if ended:
            log.warning("outlast: ended what the ranks had left behind: %s", shown(ended))
        if left:
            log.error("outlast: these processes of the ranks do not die of SIGKILL: %s", shown(left))

    @property
    def only_killed(self) -> bool:
        """Whether the newest failure is none of the program's: its likely cause is a signal, or a hang."""
        return bool(self.failures) and (self.failures[0].status < 0 or bool(self.failures[0].hang))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of this node in the newest start."""
        return tuple(worker.global_rank for worker in self._worker_group.workers)

    def remove_shared_memory(self) -> None:
        """Remove the ranks' heartbeats and rings. After a failure they stay: they show what the ranks were doing."""
        if self._watch is not None:
            self._watch.close(self.ranks)

    def _end_peers(self, processes: RankProcesses) -> None:
        """A rank has failed: end the others, without waiting for those that are inside a collective."""
        waiting = self._hung.waiting_in_collectives(processes)
        if self._relay.obeyed:  # they take no SIGTERM for an order to end
            processes.kill_all()
        processes.end(waiting, self._config.stop_grace_s)

    def _tell_restart(self) -> None:
        step = self._watch.furthest_step(self.ranks) if self._watch is not None else None
        lasted_s = time.monotonic() - self._started_s
        self._backoff_s = wait_s = self._backoff.after(step, lasted_s)
        left = self._remaining_restarts - 1
        if wait_s == 0.0:
            log.warning("outlast: restarting the ranks; %d restarts left after this", left)
            return
        log.warning(
            "outlast: %s; %d restarts left after this; Ctrl-C, or SIGTERM to this launcher, ends the job",
            self._backoff.describe(step, lasted_s, wait_s),
            left,
        )

    def _write_failure(self, result: RunResult, processes: RankProcesses) -> None:
        self._hung.keep_collectives(self.ranks)
        if not self.failures:  # a rank failed between our poll and torchelastic's
            self.failures = [
                RankFailure(rank=rank, pid=failure.pid, status=failure.exitcode)
                for rank, failure in sorted(result.failures.items())
            ]
            self.failures[:0] = [failure for failure in self._find_failures(processes) if failure.early]
        if any(one.status == NO_RESTART_STATUS for one in self.failures) or self._relay.notice is not None:
            self._remaining_restarts = 0
        restarting = self._remaining_restarts > 0
        for failure in (failure for failure in self.failures if not failure.hang):
            log.error("outlast: rank %d (pid %d) %s", failure.rank, failure.pid, failure.reason)
        if restarting:
            self._tell_restart()
        self._events.write(
            WorkersFailed(
                host=self._host,
                ranks=tuple(failure.rank for failure in self.failures),
                reasons=tuple(failure.reason for failure in self.failures),
                restarting=restarting,
            )
        )
