"""Launchers under test, each a process of its own, and what they and their ranks left."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.forked import Job
from tests.helpers import clean_env, events

HERE = Path(__file__).parent
RANK = str(HERE / "rank.py")
QUICK = {"hang_floor_s": 2.0, "hang_factor": 1.0, "monitor_interval_s": 0.2, "backoff_s": 0.1}
STARTED: list[Job] = []
"""Launchers that the fixture of conftest ends."""


def start(
    run: Path, *words: str, flags: dict[str, Any] | None = None, obeys_notice: bool = False, **config: Any
) -> Job:
    """A launcher of two ranks in a process of its own, output to ``RUN.log``."""
    told = {
        "command": [sys.executable, *words],
        "run_dir": str(run),
        "flags": {"nproc_per_node": "2", **(flags or {})},
        "config": {**QUICK, **config},
        "obeys_notice": obeys_notice,
    }
    log, env = run.with_suffix(".log"), clean_env(PYTHONPATH=str(HERE.parent.parent))
    job = Job("tests.launch.launcher", [json.dumps(told)], env=env, stdout=log, stderr=log)
    STARTED.append(job)
    return job


def finish(job: Job, run: Path, status: int = 0) -> str:
    """What the launcher and rank 0 wrote, once they have ended with ``status``."""
    found = job.wait(timeout=300)
    text = run.with_suffix(".log").read_text()
    assert found == status, text
    return text


def told(run: Path) -> str:
    """What the launcher and rank 0 have written so far."""
    log = run.with_suffix(".log")
    return log.read_text() if log.exists() else ""


def steps(run: Path) -> list[tuple[int, int, int]]:
    """``(generation, rank, step)`` of every step begun, in the order in which they were."""
    found = []
    for line in (run / "steps").read_text().splitlines():
        generation, rank, step = map(int, line.split())
        found.append((generation, rank, step))
    return found


def ranks_of(run: Path) -> list[int]:
    """Process ids of the ranks of the first start; none yet if it has not begun."""
    started = events(run, "workers_started")
    return list(started[0]["pids"]) if started else []
