"""A program with a session ends as if nothing had happened: killed at any step, under any launcher, however wrapped."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from outlast.diagnostics import build_report
from outlast.launch.failures import RESUME_STATUS
from tests.helpers import clean_env, events, outlast, steps_saved

PROGRAM = Path(__file__).with_name("program.py")
ROOT = Path(__file__).parents[2]
STEPS = 24
KILLS = int(os.environ.get("OUTLAST_TEST_KILLS", "1"))
"""In each test; 10 have been seen to end alike as well."""
QUICK = ("--launch.backoff-s", "0", "--launch.monitor-interval-s", "0.1")


def plan(folder: Path, kills: int, seed: int) -> Path:
    """Files for kills at random steps, of ranks in turns, none before the first checkpoint."""
    folder.mkdir()
    for number, step in enumerate(sorted(random.Random(seed).sample(range(4, STEPS), kills))):
        (folder / f"{step}-{number % 2}").touch()
    return folder


def launched(run: Path, *words: str | Path, restarts: int = 0, check: int | None = 0) -> str:
    done = outlast(
        *("launch", "--nproc-per-node", "2", "--max-restarts", str(restarts), "--run-dir", run, *QUICK),
        *(PROGRAM, run, *words),
        check=check,
        timeout_s=300,
    )
    return done.stdout + done.stderr


def end_of(said: str) -> str:
    (line,) = [line for line in said.splitlines() if "end " in line and "outlast:" not in line]
    return line.split("end ")[1].strip()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> str:
    """How the bare model ends on two ranks that nobody kills."""
    return end_of(launched(tmp_path_factory.mktemp("straight") / "run"))


def test_under_outlast_launch(tmp_path: Path, straight: str) -> None:
    run = tmp_path / "run"
    kills = plan(tmp_path / "kills", KILLS, 1)
    said = launched(run, "--kills", kills, restarts=KILLS)
    assert not list(kills.iterdir())
    assert end_of(said) == straight
    assert steps_saved(run)[-1] == STEPS
    assert len(events(run, "workers_failed")) == KILLS
    assert build_report(run).facts.restarts == KILLS
    # Steps have the numbers that the program gave them, also those that were done twice.
    steps = [one["step"] for one in events(run, "step") if one.rank == 0]
    assert set(steps) == set(range(1, STEPS + 1))
    assert len(steps) > STEPS
    assert not events(run, "program_step")


@pytest.mark.slow
@pytest.mark.soak  # the examples do the same with FSDP2 and a GAN
@pytest.mark.parametrize("wrap", ["fsdp2", "ddp", "gan"])
def test_however_the_model_is_wrapped(tmp_path: Path, wrap: str) -> None:
    expected = end_of(launched(tmp_path / "straight", "--wrap", wrap))
    kills = plan(tmp_path / "kills", 1, 2)
    assert end_of(launched(tmp_path / "run", "--wrap", wrap, "--kills", kills, restarts=1)) == expected
    assert not list(kills.iterdir())


@pytest.mark.soak
def test_under_torchrun(tmp_path: Path, straight: str) -> None:
    kills = plan(tmp_path / "kills", KILLS, 3)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(KILLS)]
    done = subprocess.run(
        [sys.executable, *command, PROGRAM, tmp_path / "run", "--kills", kills],
        env=clean_env(),
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert end_of(done.stdout) == straight
    assert not list(kills.iterdir())


@pytest.mark.soak
@pytest.mark.mpi
def test_under_mpirun(tmp_path: Path, straight: str) -> None:
    """mpirun ends a job with a rank that is lost; the batch script starts it again."""
    kills = plan(tmp_path / "kills", KILLS, 4)
    mpirun = Path(sys.executable).with_name("mpirun")
    command = [mpirun, "-n", "2", "--oversubscribe", "--allow-run-as-root", sys.executable, PROGRAM, tmp_path / "run"]
    for number in range(KILLS + 1):
        done = subprocess.run(
            [*command, "--kills", kills], env=clean_env(), cwd=ROOT, text=True, capture_output=True, timeout=300
        )
        assert (done.returncode == 0) == (number == KILLS), done.stderr[-3000:]
    assert end_of(done.stdout) == straight


@pytest.mark.soak
def test_a_notice_ends_it_and_it_goes_on(tmp_path: Path, straight: str) -> None:
    run = tmp_path / "run"
    said = launched(run, "--do", "notice", "--at", "8", check=RESUME_STATUS)
    assert "end " not in said.replace("ended", ""), "nothing after the block is executed"
    saved = steps_saved(run)[-1]
    assert 8 <= saved < STEPS
    assert f"ended by a notice; step {saved} is durable" in said
    assert end_of(launched(run)) == straight


def test_a_rank_that_leaves_its_loop_is_named(tmp_path: Path) -> None:
    said = launched(tmp_path / "run", "--do", "leave", "--at", "7", check=1)
    assert "EndedEarly: rank 1 has left session.steps() after step 7, while others go on" in said


@pytest.mark.slow
def test_all_may_leave(tmp_path: Path) -> None:
    end_of(launched(tmp_path / "run", "--do", "break", "--at", "7"))
    assert steps_saved(tmp_path / "run")[-1] == 7


@pytest.mark.slow
def test_on_another_number_of_ranks(tmp_path: Path) -> None:
    run = tmp_path / "run"
    launched(run, "--steps", "6")
    alone = subprocess.run(
        [sys.executable, PROGRAM, run], env=clean_env(), cwd=ROOT, text=True, capture_output=True, timeout=300
    )
    assert alone.returncode == 1
    assert "StateMismatch: draws is each rank's own, and was saved by 2 ranks; this job has 1" in alone.stderr
    assert "session.add(replicated=True, draws=...)" in alone.stderr
    assert steps_saved(run)[-1] == 6, "nothing is lost"
