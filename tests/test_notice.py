"""A notice (SIGTERM and its like) ends a run at a checkpoint, in every phase; resumed, it is as if there was none."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from outlast.diagnostics.live import Beat, clear, heartbeat_path, process_state, read_heartbeat, shm_directory
from outlast.errors import DiagnosticsError
from tests.helpers import arrays, events, outlast, start_outlast, steps_saved, tiny_config, wait_for

TWO = ["--nproc-per-node", "2", "--checkpoint.every-steps", "1000"]
"""No checkpoint is due before the end."""
LONG = [*TWO, "--trainer.steps", "100000"]


class Started:
    """``outlast launch`` of a tiny run in the background."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.config, self.run = tiny_config(folder)
        self.log = folder / "log"
        self.job = start_outlast("launch", self.config, *words, log=self.log)

    def beat(self, rank: int = 0) -> Beat | None:
        path = heartbeat_path(shm_directory(self.run), rank)
        try:
            return read_heartbeat(path) if path.exists() else None
        except DiagnosticsError:  # its header is being written
            return None

    def wait_for_phase(self, phase: str, step: int, rank: int = 0) -> None:
        def there() -> bool:
            beat = self.beat(rank)
            return beat is not None and beat.phase == phase and beat.step >= step

        wait_for(there)

    def end(self, status: int) -> str:
        """What was said, once it has ended with ``status``."""
        found = self.job.wait(timeout=90)
        said = self.log.read_text()
        assert found == status, said[-6000:]
        return said

    def steps_done(self) -> list[int]:
        """The newest step of each rank."""
        done: dict[int, int] = {}
        for record in events(self.run, "step"):
            done[record.rank] = record["step"]
        return sorted(done.values())

    def pids(self) -> list[int]:
        return [pid for record in events(self.run, "workers_started") for pid in record["pids"]]


@pytest.fixture
def started(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Started]:
    """A run with the words of the test's parameter; ended afterwards, whatever the test did."""
    made = Started(tmp_path, *getattr(request, "param", LONG))
    yield made
    if process_state(made.job.pid) != "dead":
        made.job.kill()
    made.job.wait()
    clear(shm_directory(made.run))


@pytest.mark.parametrize("started", [[*TWO, "--trainer.steps", "40"]], indirect=True)
def test_a_run_ended_by_a_notice_goes_on_as_if_there_was_none(started: Started, tmp_path: Path) -> None:
    started.wait_for_phase("step", 6)
    started.job.send_signal(signal.SIGTERM)
    said = started.end(75)
    (step,) = set(started.steps_done())
    assert step < 40
    assert steps_saved(started.run) == [step]
    assert f"ended by a notice (SIGTERM): step {step} is durable" in said
    (notice,) = events(started.run, "notice")
    assert (notice["signal"], notice["grace_s"]) == ("SIGTERM", 25.0)
    ended = events(started.run, "run_ended")
    assert [(one["step"], one["ok"], one["reason"]) for one in ended] == [(step, True, "notice (SIGTERM)")] * 2
    assert events(started.run, "workers_failed") == []
    assert not list(shm_directory(started.run).iterdir())

    outlast("launch", started.config, *TWO, "--trainer.steps", "40", "--resume", "auto")
    assert [one["first_step"] for one in events(started.run, "run_started")] == [1, 1, step + 1, step + 1]
    (tmp_path / "straight").mkdir()
    config, straight = tiny_config(tmp_path / "straight")
    outlast("launch", config, *TWO, "--trainer.steps", "40")
    one, other = (arrays(run / "checkpoints" / "step_00000040") for run in (started.run, straight))
    assert one.keys() == other.keys()
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


@pytest.mark.parametrize(
    "signum",
    [
        signal.SIGINT,
        signal.SIGUSR1,
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR2, marks=pytest.mark.slow),
    ],
)
def test_every_signal_that_tells_a_job_to_end(started: Started, signum: signal.Signals) -> None:
    started.wait_for_phase("step", 3)
    for pid in [started.job.pid, *started.pids()]:  # as schedulers do, which send it to all processes of a job
        os.kill(pid, signum)
    said = started.end(75)
    assert steps_saved(started.run) == sorted(set(started.steps_done()))
    assert f"ended by a notice ({signum.name})" in said
    assert "Traceback" not in said
