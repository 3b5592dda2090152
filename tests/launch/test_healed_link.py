"""A link between two nodes that is cut for a while, then a rank with a tenth of a core: nobody is killed, the wait is
told, and the report has both."""

from __future__ import annotations

import secrets
import sys
import time
from pathlib import Path

import pytest

from benchmarks.cluster import Cluster
from outlast.diagnostics import build_report
from tests.cpu_quota import at_most
from tests.helpers import clean_env, events, outlast, tiny_config, wait_for

CUT_S, THROTTLED_S = 20.0, 20.0


@pytest.mark.root
@pytest.mark.slow
def test_a_link_that_heals_and_a_throttled_rank_are_incidents(tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    drawn = secrets.token_hex(2)
    subnet = f"10.{96 + int(drawn[:2], 16) % 128}.{int(drawn[2:], 16)}"
    with Cluster(2, prefix=f"o{drawn}", subnet=subnet) as cluster:
        first, second = cluster.hosts
        words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-endpoint", f"{first.address}:29511"]
        words += [str(config), "--trainer.steps", "400"]
        jobs = []
        for host in cluster.hosts:
            with (tmp_path / host.name).open("w") as log:
                command = [sys.executable, "-m", "outlast", "launch", "--local-addr", host.address, *words]
                jobs.append(host.popen(command, env=clean_env(), stdout=log, stderr=log))
        wait_for(lambda: len(events(run, "step")) > 40, timeout_s=200)
        second.cut()
        time.sleep(CUT_S)
        second.heal()
        done = len(events(run, "step"))
        wait_for(lambda: len(events(run, "step")) > done + 100, timeout_s=200)
        (start,) = (record for record in events(run, "run_started") if record.rank == 1)
        with at_most(0.1, start["pid"]):
            throttled_t = time.time()
            time.sleep(THROTTLED_S)
        statuses = [job.wait(200) for job in jobs]
    said = [(tmp_path / host.name).read_text() for host in cluster.hosts]
    assert statuses == [0, 0], said
    assert not events(run, "hang_found")
    assert not events(run, "workers_failed")
    assert any("no progress for" in text for text in said), "a wait is told while it lasts"
    report = build_report(run)
    stalls = [one for one in report.incidents if one.kind == "stall"]
    assert max(one.cost_s for one in stalls) > CUT_S / 2
    slow = [one for one in report.incidents if one.cost_s and one.at_s + events(run)[0].t > throttled_t - 1]
    assert sum(one.cost_s for one in slow) > THROTTLED_S / 4, report.incidents
    assert any(one.rank == 1 for one in slow), slow  # this machine may be busy itself, and slow all
    text = outlast("report", run).stdout
    assert "No straggler" not in text.splitlines()[0]
    assert "stall" in text or "waited" in text
