"""A link between two nodes that is cut for good: the real error is told, and each launcher ends within its bound."""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.cluster import Cluster
from tests.helpers import clean_env, events, tiny_config, wait_for

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Two hosts whose own names do not resolve; names and addresses that no other test has."""
    drawn = secrets.token_hex(2)
    with Cluster(2, prefix=f"o{drawn}", subnet=f"10.{96 + int(drawn[:2], 16) % 128}.{int(drawn[2:], 16)}") as made:
        yield made


def test_a_link_is_cut_for_good(tmp_path: Path, cluster: Cluster) -> None:
    config, run = tiny_config(tmp_path)
    first, second = cluster.hosts
    words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-endpoint", f"{first.address}:29511"]
    words += ["--rdzv-conf", "join_timeout=20", str(config), "--trainer.steps", "4000"]
    words += ["--trainer.timeout-s", "8", "--comm.timeout-s", "8"]
    jobs = []
    for host in cluster.hosts:
        with (tmp_path / host.name).open("w") as log:
            command = [sys.executable, "-m", "outlast", "launch", "--local-addr", host.address, *words]
            jobs.append(host.popen(command, env=clean_env(), stdout=log, stderr=log))
    wait_for(lambda: len(events(run, "step")) > 6, timeout_s=300)
    second.cut()
    assert [job.wait(300) for job in jobs] == [1, 1]
    at_first, at_second = ((tmp_path / host.name).read_text() for host in cluster.hosts)
    for rank, said in enumerate((at_first, at_second)):
        # Whichever collective of a step it is.
        assert re.search(rf"exited with status 1: CommError: all_\w+ of .+ failed on rank {rank} of 2", said), said
        assert " hangs" not in said
    assert "LaunchError: too few nodes at the rendezvous at " in at_first
    assert f"missing: {second.address} (launcher " in at_first
    assert f"LaunchError: the rendezvous at {first.address}:29511 (id outlast) is lost: " in at_second
    own_words = [line for line in at_second.splitlines() if not line.startswith("[rank 1]")]
    assert not any(line.startswith("frame #") for line in own_words), at_second
