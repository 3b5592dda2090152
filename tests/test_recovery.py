"""Lose a rank, carry on: a run that lost one ends bit-identical to a run that did not."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from outlast.diagnostics.live import (
    heartbeat_path,
    read_heartbeat,
    shm_directory,
)
from outlast.errors import DiagnosticsError
from tests.helpers import arrays, events, outlast, start_outlast, steps_saved, tiny_config, values, wait_for

SIXTY = ["--nproc-per-node", "2", "--trainer.steps", "60", "--checkpoint.every-steps", "10", "--data.batch-size", "12"]


def pid_at_step(run: Path, rank: int, step: int) -> int:
    """The process of ``rank`` once it has reached ``step``."""

    def look() -> int:
        path = heartbeat_path(shm_directory(run), rank)
        if not path.exists():
            return 0
        try:
            beat = read_heartbeat(path)
        except DiagnosticsError:  # its header is being written
            return 0
        return beat.pid if beat.step >= step and (30 in steps_saved(run) or beat.step > 45) else 0

    found: int = wait_for(look, every_s=0.0005)
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 steps without a fault."""
    config, run = tiny_config(tmp_path_factory.mktemp("straight"))
    outlast("launch", config, *SIXTY)
    assert steps_saved(run)[-1] == 60
    return run


def assert_same_end(run: Path, straight: Path) -> None:
    mine, theirs = (folder / "checkpoints" / "step_00000060" for folder in (run, straight))
    one, other = arrays(mine), arrays(theirs)
    assert one.keys() == other.keys()
    for part in ("model/", "optimizer/", "comm/", "rank_00000/", "rank_00001/"):
        assert any(name.startswith(part) for name in one), part
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert one[name].tobytes() == other[name].tobytes(), name
    one_values, other_values = values(mine), values(theirs)
    one_values.pop("."), other_values.pop(".")  # the checkpoint's own: when and by which start it was written
    assert one_values == other_values


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_killed_rank(tmp_path: Path, straight: Path, victim: int) -> None:
    config, run = tiny_config(tmp_path)
    job = start_outlast("launch", config, *SIXTY, log=tmp_path / "log")
    os.kill(pid_at_step(run, victim, 35), signal.SIGKILL)
    assert job.wait(timeout=120) == 0, (tmp_path / "log").read_text()[-4000:]
    first_steps = [record["first_step"] for record in events(run, "run_started")]
    assert first_steps[:2] == [1, 1]
    assert len(first_steps) == 4
    assert first_steps[2] == first_steps[3] > 20
    failed = events(run, "workers_failed")
    assert any("SIGKILL" in reason for record in failed for reason in record["reasons"])
    assert_same_end(run, straight)
    first = " ".join(outlast("report", run).stdout.split("\nrun\n")[0].split())
    told = re.fullmatch(
        rf"Rank {victim} on \S+ killed \(SIGKILL\) at \S+ s, after step (\d+); .+ s and (\d+) steps? lost; recovered\.",
        first,
    )
    assert told, first
    assert int(told[1]) >= 34
    # Its peer may have ended a step that the victim was still in, and that is lost too.
    ended = max(record["step"] for record in events(run, "step") if record.generation == 0)
    assert int(told[1]) in (ended - 1, ended)
    assert int(told[2]) == ended - first_steps[2] + 1


@pytest.mark.slow
def test_a_job_whose_launcher_was_killed_too_and_that_was_started_again(tmp_path: Path) -> None:
    """Nothing that lives tells what happened; the report does."""
    config, run = tiny_config(tmp_path)
    job = start_outlast("launch", config, *SIXTY, log=tmp_path / "log")
    pids = [pid_at_step(run, rank, 35) for rank in (0, 1)]
    for pid in (job.pid, *pids):
        os.kill(pid, signal.SIGKILL)
    job.wait(timeout=60)
    outlast("launch", config, *SIXTY, "--resume", "auto")
    first = " ".join(outlast("report", run).stdout.split("\nrun\n")[0].split())
    assert re.fullmatch(
        r"Both ranks on \S+ died without a word at \S+ s, after step \d+; .+ s and \d+ steps lost; resumed by hand\.",
        first,
    )


@pytest.mark.soak
def test_a_stopped_rank_is_found_killed_and_replaced(tmp_path: Path, straight: Path) -> None:
    config, run = tiny_config(tmp_path)
    job = start_outlast("launch", config, *SIXTY, log=tmp_path / "log")
    pid = pid_at_step(run, 1, 35)
    os.kill(pid, signal.SIGSTOP)
    assert job.wait(timeout=120) == 0, (tmp_path / "log").read_text()[-4000:]
    (hang,) = events(run, "hang_found")
    assert (hang["culprit"], hang["pid"]) == (1, pid)
    assert "stopped" in hang["evidence"]
    assert hang["step"] >= 35
    assert 8.0 <= hang["limit_s"] < hang["silent_s"]
    assert_same_end(run, straight)


def test_another_seed_goes_elsewhere(tmp_path: Path, straight: Path) -> None:
    """The comparison above can fail."""
    config, run = tiny_config(tmp_path)
    outlast("launch", config, *SIXTY, "--run.seed", "1", "--trainer.steps", "10")
    one, other = (arrays(folder / "checkpoints" / "step_00000010") for folder in (run, straight))
    assert one.keys() == other.keys()
    assert not np.array_equal(one["model/head.weight"], other["model/head.weight"])


def test_resuming_by_hand_is_bit_identical_too(tmp_path: Path, straight: Path) -> None:
    config, run = tiny_config(tmp_path)
    shutil.copytree(straight, run, symlinks=True)
    done = outlast("launch", config, *SIXTY, "--resume", "40")
    assert "restored step 40" in done.stdout
    assert steps_saved(run) == [10, 20, 30, 40, 50, 60]
    assert len(list(run.glob("checkpoints/*aside*"))) == 2
    assert_same_end(run, straight)
