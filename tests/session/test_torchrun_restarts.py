"""Ranks that stock torchrun restarts meet one another, and not the addresses of the dead ones of the start before."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forked import run_main
from tests.helpers import clean_env, free_port


@pytest.mark.parametrize("rendezvous", ["static", pytest.param("c10d", marks=pytest.mark.slow)])
def test_every_restart_joins(rendezvous: str) -> None:
    """torchrun hands each start the same store, with either rendezvous."""
    flags = ["--standalone"] if rendezvous == "c10d" else ["--master-port", str(free_port())]
    flags += ["--nproc-per-node", "2", "--max-restarts", "2", "--monitor-interval", "0.1"]
    script = Path(__file__).with_name("restarted_rank.py")
    done = run_main("torch.distributed.run", [*flags, str(script), "2"], env=clean_env(), timeout_s=150)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("start 2 ended well") == 2
