"""Under a real Slurm of four nodes."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import clean_env, events, steps_saved, tiny_config, wait_for
from tests.session.test_kills import KILLS, plan
from tests.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, SlurmCluster(Path(folder), nodes=4) as cluster:
        yield cluster


@pytest.fixture
def env(root: Path) -> dict[str, str]:
    """An activated environment, as at the user's submission."""
    return clean_env(PYTHONPATH=str(root), PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def test_every_task_finds_its_place(cluster: SlurmCluster, env: dict[str, str]) -> None:
    said = cluster.run("srun", "-N", "2", "-n", "3", sys.executable, str(HERE / "place_rank.py"), env=env)
    source, address, *ranks = said.split()
    assert (source, address) == ("slurm", "127.0.0.1")
    places = [tuple(map(int, one.split(","))) for one in ranks]
    assert [place[0] for place in places] == [0, 1, 2]
    assert sorted(place[1:3] for place in places) == [(0, 1), (0, 2), (1, 2)]
    assert all(61440 <= place[4] < 65536 for place in places)


@pytest.mark.slow
def test_train_sbatch_trains_on_four_nodes(
    cluster: SlurmCluster, env: dict[str, str], root: Path, tmp_path: Path
) -> None:
    config, run = tiny_config(tmp_path)
    job = cluster.sbatch(
        str(root / "slurm" / "train.sbatch"), config.name, "--trainer.steps", "10", env=env, cwd=tmp_path
    )
    state = cluster.wait(job)
    output = (tmp_path / f"outlast-{job}.out").read_text()
    assert state == "COMPLETED", output
    started = events(run, "run_started")
    assert sorted(record.rank for record in started) == [0, 1, 2, 3]
    assert {record["world_size"] for record in started} == {4}
    assert sorted(record.rank for record in events(run, "step") if record["step"] == 10) == [0, 1, 2, 3]
    assert steps_saved(run)[-1] == 10


def test_train_sbatch_says_what_it_wants(
    cluster: SlurmCluster, env: dict[str, str], root: Path, tmp_path: Path
) -> None:
    job = cluster.sbatch(str(root / "slurm" / "train.sbatch"), env=env, cwd=tmp_path)
    assert cluster.wait(job) == "FAILED"
    assert "usage: sbatch" in (tmp_path / f"outlast-{job}.out").read_text()


def test_a_rank_that_fails_ends_the_job(cluster: SlurmCluster, env: dict[str, str], root: Path, tmp_path: Path) -> None:
    config, _ = tiny_config(tmp_path)
    job = cluster.sbatch(
        "--nodes=2",
        str(root / "slurm" / "train.sbatch"),
        config.name,
        "--data.files",
        "none/*.py",
        env=env,
        cwd=tmp_path,
    )
    assert cluster.wait(job) == "FAILED"
    assert "DataError" in (tmp_path / f"outlast-{job}.out").read_text()


@pytest.mark.soak
def test_a_requeued_job_goes_on(cluster: SlurmCluster, env: dict[str, str], root: Path, tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    script = str(root / "slurm" / "train.sbatch")
    words = ["--trainer.steps", "80", "--checkpoint.every-steps", "5"]
    job = cluster.sbatch("--nodes=2", script, config.name, *words, env=env, cwd=tmp_path)
    wait_for(lambda: steps_saved(run))
    cluster.run("scontrol", "requeue", str(job))
    assert cluster.wait(job) == "COMPLETED", (tmp_path / f"outlast-{job}.out").read_text()
    first, again = (events(run, "run_started")[i] for i in (0, -1))
    assert (first.generation, first["first_step"]) == (0, 1)
    assert again.generation == 1
    assert again["first_step"] > 5


@pytest.mark.slow
def test_a_session_under_srun_ends_as_if_nobody_had_killed_it(
    cluster: SlurmCluster, env: dict[str, str], root: Path, tmp_path: Path
) -> None:
    """Two runs of two tasks: one straight, one with tasks killed, which the batch script starts again each time."""
    script = root / "tests" / "session" / "program.py"
    kills = plan(tmp_path / "kills", KILLS, 3)
    batch = tmp_path / "job.sh"
    batch.write_text(
        f"#!/bin/bash\ncd {root}\nexport OMP_NUM_THREADS=1\n"
        f"start() {{ srun --kill-on-bad-exit=1 {sys.executable} {script} {tmp_path}/$1 --kills {kills}; }}\n"
        f"for n in $(seq {KILLS}); do start killed && exit 9; done\nstart killed && start straight\n"
    )
    job = cluster.sbatch("--nodes=2", "--ntasks-per-node=1", "--output=said", str(batch), env=env, cwd=tmp_path)
    assert cluster.wait(job) == "COMPLETED", (tmp_path / "said").read_text()
    said = (tmp_path / "said").read_text()
    assert not list(kills.iterdir())
    assert said.count("(slurm)") == KILLS + 2, said
    ends = [line for line in said.splitlines() if line.startswith("end ")]
    assert len(ends) == 2, said
    assert len(set(ends)) == 1


@pytest.mark.soak
def test_launch_sbatch_restarts_inside_the_allocation(
    cluster: SlurmCluster, env: dict[str, str], root: Path, tmp_path: Path
) -> None:
    config, run = tiny_config(tmp_path)
    script = str(root / "slurm" / "launch.sbatch")
    words = ["--trainer.steps", "80", "--checkpoint.every-steps", "5"]
    env = env | {"NPROC_PER_NODE": "1"}
    job = cluster.sbatch("--nodes=2", script, config.name, *words, env=env, cwd=tmp_path)
    wait_for(lambda: steps_saved(run))
    (victim,) = (record["pids"][0] for record in events(run, "workers_started") if record["ranks"] == [1])
    os.kill(victim, signal.SIGKILL)
    assert cluster.wait(job) == "COMPLETED", (tmp_path / f"outlast-{job}.out").read_text()
    assert {record["host"] for record in events(run, "workers_started")} == {"n1", "n2"}
    assert "killed by SIGKILL" in [reason for record in events(run, "workers_failed") for reason in record["reasons"]]
    again = [record["first_step"] for record in events(run, "run_started") if record.generation == 1]
    assert len(again) == 2
    assert min(again) > 5
    assert sorted(record.rank for record in events(run, "step") if record["step"] == 80) == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["launch.sbatch", pytest.param("train.sbatch", marks=pytest.mark.soak)])
def test_a_notice_saves_and_requeues(
    cluster: SlurmCluster, env: dict[str, str], root: Path, tmp_path: Path, script: str
) -> None:
    config, run = tiny_config(tmp_path)
    words = ["--trainer.steps", "60", "--checkpoint.every-steps", "1000"]
    job = cluster.sbatch(
        "--nodes=2", str(root / "slurm" / script), config.name, *words, env=env | {"NPROC_PER_NODE": "1"}, cwd=tmp_path
    )
    wait_for(lambda: events(run, "step"))
    cluster.run("scancel", "--signal=USR1", str(job))  # as --signal=USR1@60 does: to the steps, not to the batch script
    state = cluster.wait(job, timeout_s=300)
    output = (tmp_path / f"outlast-{job}.out").read_text()
    assert state == "COMPLETED", output
    assert "status 75 after a notice; requeueing" in output
    ended = [record for record in events(run, "run_ended") if record["step"] < 60]
    assert len(ended) == 2
    assert {record["reason"] for record in ended} == {"notice (SIGUSR1)"}
    (step,) = {record["step"] for record in ended}
    assert steps_saved(run) == [step, 60]
    assert [record["first_step"] for record in events(run, "run_started")] == [1, 1, step + 1, step + 1]
