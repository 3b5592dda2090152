"""Whole runs under the launcher: trained, killed, stopped, restarted, and the same bits in the end.

One rank over NCCL, and two ranks on one GPU over gloo; each kind straight through, with a rank killed, and with a rank
stopped, side by side. While they run, the GPU's own list of processes is watched: the launcher is never on it, and a
killed rank is off it before the next one is on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr

from benchmarks.gpu.harness import Report, Settings, run
from outlast.diagnostics import build_report
from outlast.diagnostics.live import heartbeat_path, read_heartbeat, shm_directory
from outlast.errors import DiagnosticsError
from outlast.events import Record, read_events

CONFIG = """
[run]
dir = "{folder}"
[model]
layers = 4
heads = 4
width = {width}
context = 128
[data]
files = ["{{stdlib}}/*.py"]
batch_size = 8
[optim]
warmup_steps = 5
[trainer]
steps = {steps}
eval_every_steps = 0
eval_batches = 1
bucket_mb = 1
precision = "bf16"
device = "{device}"
backend = "{backend}"
deterministic = true
[comm]
{comm}
[checkpoint]
every_steps = 10
keep_last = 0
[launch]
hang_floor_s = 5.0
monitor_interval_s = 0.2
"""
COMM = {
    "nccl": 'target = "update"\ndensity = 0.02',
    "gloo": 'target = "gradient"\nfeedback = "ef21"\ndensity = 0.05\nwarmup_steps = 3',
}


class Watch:
    """Which processes have a context on the GPU, as its driver says, over time."""

    def __init__(self, settings: Settings) -> None:
        self.seen: list[tuple[float, frozenset[int]]] = []
        self.used_by: dict[int, int] = {}
        self._on = settings.cuda
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        if not self._on:
            return
        import pynvml  # type: ignore[import-not-found,unused-ignore]

        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        while not self._stop.wait(0.05):
            found = {one.pid: one.usedGpuMemory or 0 for one in pynvml.nvmlDeviceGetComputeRunningProcesses(device)}
            self.seen.append((time.time(), frozenset(found)))
            self.used_by |= found

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def first(self, pid: int) -> float | None:
        """When a process was first seen."""
        return next((t for t, pids in self.seen if pid in pids), None)

    def last(self, pid: int) -> float | None:
        """When it was last seen."""
        return next((t for t, pids in reversed(self.seen) if pid in pids), None)


@dataclass
class Job:
    """A launcher and its run.

    Attributes:
        label: which.
        ranks: how many.
        fault: the signal for one rank, or none.
    """

    label: str
    ranks: int
    fault: signal.Signals | None
    folder: Path
    process: subprocess.Popen[bytes]
    steps: int
    hit: int = 0
    status: int | None = None
    events: list[Record] = field(default_factory=list)

    def strike(self, deadline: float) -> None:
        """Send the signal to the last rank, once it is past the middle and a checkpoint is there."""
        if self.fault is None:
            return
        path = heartbeat_path(shm_directory(self.folder), self.ranks - 1)
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                beat = read_heartbeat(path)
                if beat.step >= self.steps * 0.55 and any(self.folder.glob("checkpoints/step_*/commit.json")):
                    self.hit = beat.pid
                    os.kill(beat.pid, self.fault)
                    return
            except (DiagnosticsError, FileNotFoundError):
                pass  # it has not begun, or is being written
            time.sleep(0.002)

    def finish(self, deadline: float) -> None:
        try:
            self.status = self.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.status = self.process.wait()
        files = [*self.folder.glob("attempts/[0-9]*/events/*.jsonl"), *self.folder.glob("events/*.jsonl")]
        self.events = sorted((record for file in files for record in read_events(file)), key=lambda record: record.t)

    def of(self, kind: str) -> list[Record]:
        return [event for event in self.events if event.kind == kind]


def start(settings: Settings, root: Path, backend: str, ranks: int, fault: signal.Signals | None) -> Job:
    """Begin a run."""
    label = f"{backend}-{'straight' if fault is None else fault.name}"
    folder, steps = root / label, settings.size(60, 40)
    config = root / f"{label}.toml"
    text = CONFIG.format(
        folder=folder, width=settings.size(256, 32), steps=steps, device=settings.device.type,
        backend=backend if settings.cuda else "auto", comm=COMM[backend],
    )  # fmt: skip
    config.write_text(text)
    words = [sys.executable, "-m", "outlast", "launch", str(config), "--nproc-per-node", str(ranks)]
    with (root / f"{label}.log").open("wb") as log:
        process = subprocess.Popen(
            words, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    return Job(label, ranks, fault, folder, process, steps)


def arrays(job: Job) -> dict[str, npt.NDArray[Any]]:
    """All of the last checkpoint."""
    group = zarr.open_group(str(job.folder / "checkpoints" / f"step_{job.steps:08d}"), mode="r")
    return {name: np.asarray(node[...]) for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}


def judge(report: Report, job: Job, straight: Job) -> None:
    """One run that a rank was lost from, against the one without."""
    mine, theirs = arrays(job), arrays(straight)
    differ = [name for name in theirs if name not in mine or mine[name].tobytes() != theirs[name].tobytes()]
    again = [event["first_step"] for event in job.of("run_started")]
    found = [event["evidence"] for event in job.of("hang_found")]
    failed = [reason for event in job.of("workers_failed") for reason in event["reasons"]]
    summary = build_report(job.folder)
    right = (found if job.fault == signal.SIGSTOP else any("SIGKILL" in reason for reason in failed)) and len(
        summary.incidents
    ) > 0
    report.add(
        f"{job.label}: the same bits in the end",
        job.status == 0 and not differ and bool(right) and max(again) > 1,
        arrays=len(theirs),
        differ=differ[:3],
        went_on_from=max(again) if again else 0,
        found=found[:1] or failed[:1],
        incidents=len(summary.incidents),
        report_html=(job.folder / "report.html").exists(),
    )


def contexts(report: Report, watch: Watch, jobs: list[Job]) -> None:
    """Who was on the GPU, and when."""
    launchers = {job.process.pid for job in jobs}
    everyone = frozenset[int]().union(*(pids for _, pids in watch.seen)) if watch.seen else frozenset[int]()
    report.add("no launcher has a context", bool(everyone) and not launchers & everyone, processes_seen=len(everyone))
    gaps = {}
    for job in jobs:
        if not job.hit:
            continue
        starts = [event["pids"] for event in job.of("workers_started")]
        later = [watch.first(pid) for pids in starts[1:] for pid in pids]
        before = [watch.last(pid) for pid in starts[0]]
        firsts, lasts = [t for t in later if t is not None], [t for t in before if t is not None]
        if firsts and lasts:
            gaps[job.label] = round(min(firsts) - max(lasts), 2)
    passed = bool(gaps) and all(gap > 0 for gap in gaps.values())
    report.add("a lost rank is off the GPU before the next is on", passed, seconds_between=gaps)


def section(report: Report, settings: Settings) -> None:
    """All at once."""
    deadline = time.monotonic() + settings.seconds - 5
    plan: list[tuple[str, int, signal.Signals | None]] = [
        ("nccl", 1, None),
        ("nccl", 1, signal.SIGKILL),
        ("gloo", 2, None),
        ("gloo", 2, signal.SIGKILL),
        ("gloo", 2, signal.SIGSTOP),
    ]
    if settings.tiny:
        plan = plan[2:4]
    with tempfile.TemporaryDirectory(prefix="outlast-runs-") as name:
        watch = Watch(settings)
        jobs = [start(settings, Path(name), *one) for one in plan]
        strikers = [threading.Thread(target=job.strike, args=(deadline,)) for job in jobs]
        for striker in strikers:
            striker.start()
        for job, striker in zip(jobs, strikers, strict=True):
            job.finish(deadline)
            striker.join()
            print(f"---- {job.label}\n", (Path(name) / f"{job.label}.log").read_text()[-3000:])
        watch.close()
        by_label = {job.label: job for job in jobs}
        for job in jobs:
            losses = [event["loss"] for event in job.of("step") if event.rank == 0]
            if job.fault is None:
                learned = bool(losses) and sum(losses[-5:]) < sum(losses[:5])
                report.add(
                    f"{job.label}: trains",
                    job.status == 0 and learned,
                    status=job.status,
                    losses=[*losses[:1], *losses[-1:]],
                )
            else:
                straight = by_label[f"{job.label.split('-')[0]}-straight"]
                report.attempt(f"{job.label}: the same bits", partial(judge, report, job, straight))
        if settings.cuda:
            report.attempt("contexts", lambda: contexts(report, watch, jobs))


if __name__ == "__main__":
    torch.set_num_threads(2)
    run("runs", section)
