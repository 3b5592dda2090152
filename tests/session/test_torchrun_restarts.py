"""Ranks that stock torchrun restarts meet one another, and not the addresses of the dead ones of the start before."""

from __future__ import annotations

from pathlib import Path

import pytest

from outlast.free_port import free_port
from tests.forked import Job, run_main
from tests.helpers import clean_env


@pytest.mark.soak
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_every_restart_joins(rendezvous: str) -> None:
    """torchrun hands each start the same store, with either rendezvous."""
    flags = ["--standalone"] if rendezvous == "c10d" else ["--master-port", str(free_port())]
    flags += ["--nproc-per-node", "2", "--max-restarts", "2", "--monitor-interval", "0.1"]
    script = Path(__file__).with_name("restarted_rank.py")
    done = run_main("torch.distributed.run", [*flags, str(script), "2"], env=clean_env(), timeout_s=150)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("start 2 ended well") == 2


@pytest.mark.slow
def test_every_restart_joins_on_two_nodes(tmp_path: Path) -> None:
    """Each node counts the failures of its own ranks, so that the two counts differ from the first restart on."""
    script = Path(__file__).with_name("restarted_rank.py")
    port = free_port()
    flags = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--monitor-interval", "0.1"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "one"]
    logs = [tmp_path / f"node_{node}" for node in range(2)]
    done = tmp_path / "kills"
    done.mkdir()
    jobs = [
        Job(
            "torch.distributed.run",
            [*flags, *meeting, str(script), "2", str(done)],
            env=clean_env(),
            stdout=log,
            stderr=log,
        )
        for log in logs
    ]
    for job, log in zip(jobs, logs, strict=True):
        assert job.wait(150) == 0, log.read_text()[-4000:]
    assert sum(log.read_text().count("ended well") for log in logs) == 2
    assert len(list(done.iterdir())) == 2
