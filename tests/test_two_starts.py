"""A second start in the place of a live run: refused at once with who holds it, and the first goes on untouched."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from outlast.diagnostics.live import shm_directory
from tests.forked import Job
from tests.helpers import events, outlast, start_outlast, steps_saved, tiny_config, wait_for

LAST = 60
ALL = list(range(5, LAST + 1, 5))
SETTINGS = ("--trainer.steps", str(LAST))


class Live:
    """A run that another start finds alive, stopped in the middle of a save."""

    def __init__(self, job: Job, run: Path) -> None:
        self.job = job
        self.run = run
        self.rank: int = wait_for(lambda: events(run, "run_started"))[0]["pid"]
        self.pids = {job.pid, self.rank}
        self.shm = shm_directory(run)

    def stop_in_save(self) -> Path:
        """Stop its processes while a step is written and not committed, after others were; the step's folder."""
        wait_for(lambda: steps_saved(self.run))
        while True:
            found: Path = wait_for(lambda: next(iter(self._in_progress()), None), every_s=0.0002)
            self.signal(signal.SIGSTOP)
            wait_for(lambda: all(_state(pid) == "T" for pid in self.pids))
            if found in self._in_progress():
                return found
            self.signal(signal.SIGCONT)  # it was committed in between

    def signal(self, signum: int) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signum)

    def files(self) -> dict[str, int]:
        """What a second start could take away: the save in progress, heartbeats and rings, by inode."""
        shared = [path for path in self.shm.iterdir() if path.name.startswith(("heartbeat_", "ring_"))]
        saved = [path for path in (self.run / "checkpoints").rglob("*") if path.is_file()]
        assert len(shared) == 2
        return {str(path): path.stat().st_ino for path in (*shared, *saved)}

    def _in_progress(self) -> list[Path]:
        return [
            folder
            for folder in (self.run / "checkpoints").glob("step_????????")
            if list(folder.glob("*")) and not (folder / "commit.json").exists()
        ]


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextmanager
def live(tmp_path: Path, verb: str) -> Iterator[tuple[Path, Live]]:
    """A run that ``verb`` started, and its config."""
    config, run = tiny_config(tmp_path)
    job = start_outlast(*command(verb, config), log=tmp_path / "log")
    first = None
    try:
        first = Live(job, run)
        yield config, first
    finally:
        if first is not None:
            first.signal(signal.SIGKILL)
        job.kill()
        job.wait()


def command(verb: str, config: Path, *more: str | Path) -> list[str | Path]:
    ranks = ("--nproc-per-node", "1") if verb == "launch" else ()
    return [verb, config, *ranks, *SETTINGS, *more]


def second(verb: str, config: Path, *more: str | Path) -> subprocess.CompletedProcess[str]:
    return outlast(*command(verb, config, "--resume", "auto", *more), check=None)


@pytest.mark.parametrize(("verb", "other"), [("launch", "train"), ("train", "launch")])
def test_the_second_is_refused_and_the_first_goes_on(tmp_path: Path, verb: str, other: str) -> None:
    with live(tmp_path, verb) as (config, first):
        saving = first.stop_in_save()
        before = first.files()
        for started in dict.fromkeys((other, "launch")):
            done = second(started, config)
            assert done.returncode not in (0, -signal.SIGKILL), done.stderr
            # Who holds it, and the ways out.
            assert str(first.run) in done.stderr
            assert f"process {first.rank}" in done.stderr
            assert "stop that job, or wait until it ends" in done.stderr
            assert "--run.dir OTHER" in done.stderr
        # The same checkpoints from another run's directory.
        elsewhere = tmp_path / "elsewhere"
        checkpoints = first.run / "checkpoints"
        done = second(other, config, "--run.dir", elsewhere, "--checkpoint.url", checkpoints)
        assert done.returncode not in (0, -signal.SIGKILL)
        assert f"{checkpoints} is in use by process {first.rank}" in done.stderr, done.stderr
        assert first.files() == before
        first.signal(signal.SIGCONT)
        assert first.job.wait(120) == 0, (tmp_path / "log").read_text()[-4000:]
    assert (saving / "commit.json").exists()
    assert steps_saved(first.run) == ALL
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"step_{step:08d}" for step in ALL]
    assert [record["pid"] for record in events(first.run, "run_started")] == [first.rank]
    assert not events(first.run, "checkpoint_failed")
    assert not events(first.run, "workers_failed")
    assert not first.shm.exists()


def test_after_the_first_was_killed_the_second_goes_on(tmp_path: Path) -> None:
    """On the same machine at once; a node that nobody can ask lets go when its lease ends."""
    with live(tmp_path, "launch") as (config, first):
        first.stop_in_save()
        saved = steps_saved(first.run)
        first.signal(signal.SIGKILL)
        first.job.wait()
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(first.run, elsewhere, symlinks=True)
    for lease in (*elsewhere.glob("lease_*.json"), *elsewhere.glob("checkpoints/lease_*.json")):
        record = json.loads(lease.read_text())
        record["holder"] |= {"machine": "another:pid:[1]", "host": "node-b"}
        lease.write_text(json.dumps(record | {"lease_s": 1.0}).ljust(2048))
    for run, verb in ((first.run, "launch"), (elsewhere, "train")):
        done = second(verb, config, "--run.dir", run)
        assert done.returncode == 0, done.stderr
        assert f"restored step {saved[-1]}" in done.stdout
        assert steps_saved(run) == ALL
    assert "node-b" in done.stdout + done.stderr


def test_of_two_at_the_same_moment_one_trains(tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    run.mkdir()
    verbs = ("train", "launch")
    logs = [tmp_path / verb for verb in verbs]
    jobs = [
        start_outlast(*command(verb, config, "--resume", "auto"), log=log)
        for verb, log in zip(verbs, logs, strict=True)
    ]
    statuses = [job.wait(120) for job in jobs]
    assert statuses.count(0) == 1, [log.read_text()[-2000:] for log in logs]
    loser = statuses.index(next(status for status in statuses if status))
    assert "is in use by process" in logs[loser].read_text() or "is its rank 0" in logs[loser].read_text()
    assert steps_saved(run) == ALL
    assert len(events(run, "run_started")) == 1
