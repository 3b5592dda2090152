"""Runs that never ran: the event files they would have left, with every clock and every lateness known."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch
from urllib.parse import quote

import numpy as np

from outlast.events import (
    CheckpointFailed,
    CheckpointRejected,
    CheckpointRestored,
    CheckpointSaved,
    EvalDone,
    Event,
    EventLog,
    HangFound,
    RunEnded,
    RunStarted,
    StepDone,
    WorkersFailed,
    WorkersStarted,
)

START_T = 1_790_000_000.0


@dataclass(kw_only=True)
class SyntheticRun:
    """Writes events as the trainer and the launcher do, on a clock of its own."""

    run_dir: Path
    ranks: int = 4
    ranks_per_host: int = 2
    steps: int = 60
    compute_s: float = 0.240
    noise_s: float = 0.003
    late_s: dict[int, float] = field(default_factory=dict)
    """Of a rank: how much longer each of its steps takes before its first collective."""
    stalls: dict[int, tuple[str, float]] = field(default_factory=dict)
    """Of a step: what stalls, for how many seconds: ``link``, ``all``, ``data``, or ``rank N``."""
    looked_every: int = 1
    """Collectives are looked at in so many steps once."""
    checkpoint_every: int = 10
    eval_every: int = 20
    seed: int = 0
    parameters: int = 10_800_000

    def __post_init__(self) -> None:
        self.t = START_T
        self.rng = np.random.default_rng(self.seed)
        self.attempt = 0
        self.logs: list[EventLog] = []
        (self.run_dir / "events").mkdir(parents=True, exist_ok=True)

    def hosts(self) -> list[str]:
        return [f"node-{chr(97 + rank // self.ranks_per_host)}" for rank in range(self.ranks)]

    def write(self, log: EventLog, event: Event, t: float | None = None) -> None:
        with patch.object(time, "time", lambda: self.t if t is None else t):
            log.write(event)

    def launcher(self, event: Event, *, generation: int, host: str = "node-a") -> None:
        with EventLog(
            self.run_dir / "events" / f"agent_{quote(host, safe='')}.jsonl", rank=-1, generation=generation
        ) as log:
            self.write(log, event)

    def start(
        self,
        *,
        generation: int = 0,
        first_step: int = 1,
        hosts: list[str] | None = None,
        rejected: CheckpointRejected | None = None,
    ) -> None:
        self.attempt += 1
        folder = self.run_dir / "attempts" / f"{self.attempt:04d}" / "events"
        folder.mkdir(parents=True)
        hosts = hosts or self.hosts()
        for host in dict.fromkeys(hosts):
            mine = tuple(rank for rank in range(self.ranks) if hosts[rank] == host)
            pids = tuple(1000 * self.attempt + rank for rank in mine)
            started = WorkersStarted(host=host, ranks=mine, pids=pids, restarts_left=3 - generation)
            self.launcher(started, generation=generation, host=host)
        self.t += 4.0
        self.logs = [
            EventLog(folder / f"rank_{rank:05d}.jsonl", rank=rank, generation=generation) for rank in range(self.ranks)
        ]
        for rank, log in enumerate(self.logs):
            if rejected is not None and rank == 0:
                self.write(log, rejected)
            if first_step > 1:
                self.write(log, CheckpointRestored(step=first_step - 1, url="x", seconds=0.41, tiers={"storage": 768}))
            self.write(
                log,
                RunStarted(
                    attempt=self.attempt,
                    world_size=self.ranks,
                    host=hosts[rank],
                    pid=1000 * self.attempt + rank,
                    device="cpu",
                    first_step=first_step,
                    last_step=self.steps,
                    parameters=self.parameters,
                    comm="ef21 topk 5%",
                ),
            )

    def train(self, first: int, last: int, *, failing: int | None = None) -> None:
        """Steps ``first`` to ``last``. Every rank computes, the latest is waited for, then bytes are exchanged.

        The checkpoint of step ``failing`` is not committed.
        """
        for step in range(first, last + 1):
            own_s = self.compute_s + np.abs(self.rng.normal(0, self.noise_s, self.ranks))
            for rank, late_s in self.late_s.items():
                own_s[rank] += late_s
            transfer_s = 0.030 + float(np.abs(self.rng.normal(0, self.noise_s)))
            data_s = 0.004
            what, seconds = self.stalls.get(step, ("", 0.0))
            if what == "link":
                transfer_s += seconds
            elif what.startswith("rank"):
                own_s[int(what.split()[1])] += seconds
            elif what:
                own_s += seconds
                data_s += seconds if what == "data" else 0.0
            checkpoint_s = 0.012 if step % self.checkpoint_every == 0 else 0.0004
            step_s = float(own_s.max()) + transfer_s + checkpoint_s
            self.t += step_s
            loss = 2.2 + 3.3 * float(np.exp(-step / (self.steps / 4)))
            for rank, log in enumerate(self.logs):
                waited_s = float(own_s.max() - own_s[rank])
                self.write(
                    log,
                    StepDone(
                        step=step,
                        loss=loss + float(self.rng.normal(0, 0.05)),
                        grad_norm=1.0 + 4 / step,
                        lr=3e-4 * min(1.0, step / 10),
                        tokens=4096,
                        step_s=step_s,
                        data_s=data_s,
                        comm_s=0.6 * transfer_s + waited_s,
                        checkpoint_s=checkpoint_s,
                        collective_s=transfer_s + waited_s if step % self.looked_every == 0 else None,
                        codec_s=0.018,
                        wire_bytes=5_700_000,
                        dense_bytes=64_800_000,
                    ),
                )
            if step == failing:
                for log in self.logs[:2]:
                    self.write(log, CheckpointFailed(step=step, reason="no vote of rank 3 within 30 s"), self.t + 1.9)
            elif step % self.checkpoint_every == 0:
                for rank, log in enumerate(self.logs):
                    saved = CheckpointSaved(
                        step=step, committed=rank == 0, size_bytes=34_000_000, blocked_s=checkpoint_s, durable_s=1.3
                    )
                    self.write(log, saved, self.t + 1.3)
            if step % self.eval_every == 0:
                self.t += 0.8
                for log in self.logs:
                    self.write(log, EvalDone(step=step, loss=loss + 0.1, seconds=0.8))

    def end(self, *, ok: bool = True, reason: str = "") -> None:
        for log in self.logs:
            if ok:
                self.write(log, RunEnded(step=self.steps, ok=ok, reason=reason))
            log.close()

    def fail(self, rank: int, *, generation: int, step: int, hang: bool = False) -> None:
        """The launcher finds a rank hung or dead, and restarts all."""
        host = self.hosts()[rank]
        if hang:
            self.t += 10.3
            evidence = (
                f"stopped (state T), last entered all_gather #1234 in step {step}, completed; "
                f"{self.ranks - 1} peers have been waiting 9.1 s in all_gather #1235"
            )
            found = HangFound(culprit=rank, pid=4711, step=step, silent_s=10.3, limit_s=10.0, evidence=evidence)
            self.launcher(found, generation=generation, host=host)
        reason = "killed by SIGKILL"
        failed = WorkersFailed(host=host, ranks=(rank,), reasons=(reason,), restarting=True)
        self.launcher(failed, generation=generation, host=host)
        for log in self.logs:
            log.close()
        self.t += 0.5


def clean(run_dir: Path, **settings: object) -> SyntheticRun:
    """All steps, without anything happening."""
    run = SyntheticRun(run_dir=run_dir, **settings)  # type: ignore[arg-type]
    run.start()
    run.train(1, run.steps)
    run.end()
    return run


def eventful(run_dir: Path, **settings: object) -> SyntheticRun:
    """A rank is killed at 58 %, another stopped at 80 %, one checkpoint fails and one is rejected."""
    run = SyntheticRun(run_dir=run_dir, **settings)  # type: ignore[arg-type]
    every = run.checkpoint_every
    kill, stop = int(run.steps * 0.58), int(run.steps * 0.8)
    run.start()
    run.train(1, kill, failing=2 * every)
    run.fail(1, generation=0, step=kill + 1)
    back = kill // every * every + 1
    run.start(generation=1, first_step=back)
    run.train(back, stop)
    run.fail(run.ranks - 1, generation=1, step=stop + 1, hang=True)
    back = stop // every * every - every + 1
    rejected = CheckpointRejected(step=back + every - 1, reason="checksum of a chunk is wrong", file="model/wte/c/0/0")
    run.start(generation=2, first_step=back, rejected=rejected)
    run.train(back, run.steps)
    run.end()
    return run
