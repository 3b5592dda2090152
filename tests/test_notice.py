"""A notice (SIGTERM and its like) ends a run at a checkpoint, in every phase; resumed, it is as if there was none."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from outlast.diagnostics.live import Beat, clear, heartbeat_path, process_state, read_heartbeat, shm_directory
from outlast.errors import DiagnosticsError
from tests.forked import Job
from tests.helpers import (
    arrays,
    clean_env,
    events,
    free_port,
    outlast,
    start_outlast,
    steps_saved,
    tiny_config,
    wait_for,
)

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
    report = outlast("report", started.run).stdout
    assert f"Not finished: {step} of 40 steps" in report
    assert "got SIGTERM" in report
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
        pytest.param(signal.SIGHUP, marks=pytest.mark.soak),
        pytest.param(signal.SIGUSR2, marks=pytest.mark.soak),
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


EVALUATING = [*LONG, "--trainer.eval-every-steps", "3", "--trainer.eval-batches"]


@pytest.mark.parametrize("started", [[*EVALUATING, "100000"]], indirect=True)
def test_before_the_first_step(started: Started) -> None:
    started.wait_for_phase("eval", 0)
    started.job.send_signal(signal.SIGTERM)
    said = started.end(75)
    assert "step 0: the evaluation is cut off" in said
    assert "no step had been done" in said
    assert (steps_saved(started.run), events(started.run, "step")) == ([], [])


@pytest.mark.parametrize("started", [[*EVALUATING, "500", "--checkpoint.memory-every-steps", "1"]], indirect=True)
def test_during_evaluation(started: Started) -> None:
    """Of a step that was saved, but to memory alone."""
    started.wait_for_phase("eval", 3)
    started.job.send_signal(signal.SIGTERM)
    said = started.end(75)
    assert "step 3: the evaluation is cut off" in said
    assert (started.steps_done(), steps_saved(started.run)) == ([3, 3], [3])


def test_during_set_up(started: Started) -> None:
    """The launcher has started its ranks, which still import what they need."""
    wait_for(started.pids)
    started.job.send_signal(signal.SIGTERM)
    for pid in started.pids():
        os.kill(pid, signal.SIGTERM)  # they take none for an order to die
    said = started.end(75)
    assert "SIGTERM" in said
    assert (steps_saved(started.run), events(started.run, "step")) == ([], [])


@pytest.mark.parametrize("started", [["--nnodes", "2", "--rdzv-endpoint", "localhost:0", *LONG]], indirect=True)
def test_while_the_launcher_waits_for_other_nodes(started: Started) -> None:
    wait_for(lambda: events(started.run) or (started.run / "launch.secret").exists())
    time.sleep(1.0)
    started.job.send_signal(signal.SIGUSR1)
    assert "SIGUSR1 came before the ranks had begun a step" in started.end(75)
    assert events(started.run, "workers_started") == []


@pytest.mark.parametrize("started", [[*LONG, "--launch.notice-grace-s", "6"]], indirect=True)
def test_a_stuck_rank_does_not_hold_up_the_end(started: Started) -> None:
    """Nor does one that ends with nothing saved pretend that it has."""
    started.wait_for_phase("step", 3)
    os.kill(started.pids()[1], signal.SIGSTOP)
    started.job.send_signal(signal.SIGTERM)
    said = started.end(143)
    done = [record["step"] for record in events(started.run, "step") if record.rank == 0][-1]
    assert f"no step of this run is durable, the last one done {done}: {done} steps will be repeated" in said
    assert steps_saved(started.run) == []
    assert all(process_state(pid) == "dead" for pid in started.pids())


@pytest.mark.parametrize(
    "started", [[*LONG, "--launch.notice-grace-s", "600", "--launch.hang-floor-s", "60"]], indirect=True
)
def test_a_second_signal_ends_it_at_once(started: Started) -> None:
    started.wait_for_phase("step", 3)
    os.kill(started.pids()[1], signal.SIGSTOP)  # else the run would have ended by itself before
    started.job.send_signal(signal.SIGINT)
    started.job.send_signal(signal.SIGINT)  # the same notice, by another way
    wait_for(lambda: events(started.run, "notice"))
    time.sleep(1.5)
    assert process_state(started.job.pid) != "dead"
    started.job.send_signal(signal.SIGTERM)
    assert "a second signal came before the ranks had ended" in started.end(130)
    assert all(process_state(pid) == "dead" for pid in started.pids())


@pytest.mark.parametrize("everybody", [True, False])
def test_under_torchrun(tmp_path: Path, everybody: bool) -> None:
    """torchrun gets SIGTERM and passes it on; or a single rank gets SIGUSR1, as of srun."""
    config, run = tiny_config(tmp_path)
    log = tmp_path / "log"
    words = [
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        "-m",
        "outlast.trainer",
        str(config),
        *LONG[2:],
    ]
    job = Job("torch.distributed.run", words, env=clean_env(), stdout=log, stderr=log)
    wait_for(lambda: len(events(run, "step")) > 6)
    pids = {record.rank: record["pid"] for record in events(run, "run_started")}
    if everybody:
        job.send_signal(signal.SIGTERM)
    else:
        os.kill(pids[1], signal.SIGUSR1)
    assert job.wait(timeout=90) == 1  # torchrun's own
    ended = events(run, "run_ended")
    assert {record["reason"] for record in ended} <= {
        "notice (SIGTERM)",
        "notice (SIGUSR1)",
        "notice (on another node)",
    }
    assert [record["ok"] for record in ended] == [True, True]
    assert steps_saved(run) == sorted({record["step"] for record in ended})
    assert not list(shm_directory(run).iterdir())
    clear(shm_directory(run))


def test_ranks_that_nothing_watches(tmp_path: Path) -> None:
    """As of srun. One is stuck; its peer waits for it inside a collective, where no handler of Python's runs."""
    config, run = tiny_config(tmp_path)
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [*LONG[2:], "--launch.notice-grace-s", "600"]
    jobs = []
    for rank in ("0", "1"):
        env = clean_env(RANK=rank, LOCAL_RANK=rank, **place)
        jobs.append(start_outlast("train", config, *words, log=tmp_path / f"log{rank}", env=env))
    wait_for(lambda: len(events(run, "step")) > 6)
    jobs[1].send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    deadline_s = time.monotonic() + 60
    while process_state(jobs[0].pid) == "running" and time.monotonic() < deadline_s:
        jobs[0].send_signal(signal.SIGHUP)
        time.sleep(2.0)
    assert jobs[0].wait(timeout=90) == 129
    assert "ends by SIGHUP: a second signal" in (tmp_path / "log0").read_text()
    jobs[1].kill()
    jobs[1].wait()
    clear(shm_directory(run))


def test_a_notice_to_one_node_ends_all(tmp_path: Path) -> None:
    """Even if that node's rank is the one that is stuck: the other's launcher does not wait for it, nor restarts."""
    config, run = tiny_config(tmp_path)
    words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", *LONG[2:]]
    words += ["--local-addr", "127.0.0.1", "--launch.monitor-interval-s", "0.2", "--run.resume", "auto"]
    for stuck, status in ((False, 75), (True, 143)):
        before = len(events(run, "step"))
        logs = [tmp_path / f"log{node}{stuck}" for node in (0, 1)]
        more = ["--launch.notice-grace-s", "4"] if stuck else []
        jobs = [start_outlast("launch", config, *words, *more, log=log) for log in logs]
        wait_for(lambda least=before: len(events(run, "step")) > least + 6)
        (pid,) = next(one["pids"] for one in reversed(events(run, "workers_started")) if one["ranks"] == [1])
        (told,) = [job for job in jobs if job.pid in [one.pid for one in psutil.Process(pid).parents()]]
        if stuck:
            os.kill(pid, signal.SIGSTOP)
        told.send_signal(signal.SIGTERM)
        assert [job.wait(timeout=90) for job in jobs] == [status, status], "".join(log.read_text() for log in logs)
        assert "another node's launcher got SIGTERM" in logs[1 - jobs.index(told)].read_text()
    (saved,) = steps_saved(run)
    assert saved == min(record["step"] for record in events(run, "run_ended"))
    assert events(run, "run_started")[-1]["first_step"] == saved + 1


def test_before_there_are_ranks(tmp_path: Path) -> None:
    """The launcher still reads its settings, here from a pipe that nobody writes to."""
    config, log = tmp_path / "config.toml", tmp_path / "log"
    os.mkfifo(config)
    job = start_outlast("launch", config, *LONG, log=log)

    def listens() -> bool:
        status = Path(f"/proc/{job.pid}/status").read_text()
        caught = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), 16)
        return bool(caught >> (signal.SIGUSR2 - 1) & 1)

    wait_for(listens)
    job.send_signal(signal.SIGUSR2)
    assert job.wait(timeout=60) == 75
    assert "SIGUSR2 came before the ranks were started" in log.read_text()
