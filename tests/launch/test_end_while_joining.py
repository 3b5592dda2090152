"""SIGTERM ends a launcher within its bound also before it has ranks."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from outlast.free_port import free_port
from tests.helpers import wait_for
from tests.launch.jobs import finish, start, told


def test_while_it_waits_for_other_nodes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = {"nproc_per_node": "1", "nnodes": "2", "rdzv_endpoint": f"127.0.0.1:{free_port()}"}
    job = start(run, "-c", "pass", flags=flags)
    wait_for(lambda: "waiting for nodes at " in told(run))
    job.send_signal(signal.SIGTERM)
    finish(job, run, status=128 + signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("address", ["192.0.2.1", "127.0.0.1"])
def test_while_it_connects(tmp_path: Path, address: str) -> None:
    """To a host that never answers (RFC 5737), or has no launcher yet: torch's call does not return meanwhile."""
    run = tmp_path / "run"
    more = {"nnodes": "2", "rdzv_endpoint": f"{address}:{free_port()}", "rdzv_conf": "is_host=false,read_timeout=200"}
    job = start(run, "-c", "pass", flags={"nproc_per_node": "1", **more}, stop_grace_s=0.0)
    wait_for(lambda: psutil.Process(job.pid).children())  # its guard: it is about to connect
    time.sleep(3.0)
    job.send_signal(signal.SIGTERM)
    finish(job, run, status=128 + signal.SIGTERM)
