"""A link between two nodes that is cut for a while: nobody is killed, the wait is told, and the report has it."""

from __future__ import annotations

import secrets
import sys
import time
from pathlib import Path

import pytest

from benchmarks.cluster import Cluster
from outlast.diagnostics import build_report
from tests.helpers import clean_env, events, outlast, tiny_config, wait_for

CUT_S = 20.0


@pytest.mark.root
@pytest.mark.slow
def test_a_link_that_is_cut_and_heals_is_an_incident(tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    drawn = secrets.token_hex(2)
    subnet = f"10.{96 + int(drawn[:2], 16) % 128}.{int(drawn[2:], 16)}"
    with Cluster(2, prefix=f"o{drawn}", subnet=subnet) as cluster:
        first, second = cluster.hosts
        words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-endpoint", f"{first.address}:29511"]
        words += [str(config), "--trainer.steps", "160"]
        jobs = []
        for host in cluster.hosts:
            with (tmp_path / host.name).open("w") as log:
                command = [sys.executable, "-m", "outlast", "launch", "--local-addr", host.address, *words]
                jobs.append(host.popen(command, env=clean_env(), stdout=log, stderr=log))
        wait_for(lambda: len(events(run, "step")) > 40, timeout_s=200)
        second.cut()
        time.sleep(CUT_S)
        second.heal()
        statuses = [job.wait(200) for job in jobs]
    said = [(tmp_path / host.name).read_text() for host in cluster.hosts]
    assert statuses == [0, 0], said
    assert not events(run, "hang_found")
    assert not events(run, "workers_failed")
    assert any("no progress for" in text for text in said), "a wait is told while it lasts"
    stalls = [one for one in build_report(run).incidents if one.kind == "stall"]
    assert max(one.cost_s for one in stalls) > CUT_S / 2
    text = outlast("report", run).stdout
    assert "No straggler" not in text.splitlines()[0]
    assert "stall" in text or "waited" in text
