"""Why a rank is slow is told while the job runs, of real ranks; and whose link it is, before anybody is accused."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from benchmarks.cluster import Cluster
from outlast.diagnostics import build_report
from tests.cpu_quota import at_most
from tests.helpers import clean_env, events, outlast, start_outlast, wait_for
from tests.launch.jobs import STARTED

SCRIPT = Path(__file__).with_name("held_program.py")
QUICK = ("--launch.monitor-interval-s", "0.2", "--launch.node-sample-s", "0.5")
CAUSES = {
    "data": "data loading: ",
    "garbage": "garbage collection: ",
    "work": "uneven work: ",
    "quota": "a throttled cgroup: ",
    "neighbour": "another process on its cores: ",
}


@contextmanager
def beside(pid: int) -> Iterator[None]:
    """The process has one core, which three others want too."""
    core = min(psutil.Process(pid).cpu_affinity())
    psutil.Process(pid).cpu_affinity([core])
    code = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    try:
        yield
    finally:
        for one in others:
            one.kill()
            one.wait(20)


@pytest.mark.soak
@pytest.mark.parametrize("what", CAUSES)
def test_the_cause_is_told_with_its_evidence_and_stands_in_status_and_report(tmp_path: Path, what: str) -> None:
    run, heal, log = tmp_path / "run", tmp_path / "heal", tmp_path / "log"
    held_by = "nothing" if what in ("quota", "neighbour") else what
    words = ["--nproc_per_node", "2", "--run-dir", run, *QUICK, SCRIPT, held_by, heal, "4000", "16"]
    job = start_outlast("launch", *words, log=log)
    STARTED.append(job)
    with ExitStack() as stack:
        wait_for(lambda: run.exists() and len(events(run, "program_step")) > 40)
        (start,) = (one for one in events(run, "run_started") if one.rank == 1)
        if what == "quota":
            stack.enter_context(at_most(0.2, start["pid"]))
        elif what == "neighbour":
            stack.enter_context(beside(start["pid"]))
        # on a busy machine others' processes may be seen at the same time, before what it was has been measured
        wait_for(lambda: [one for one in events(run, "verdict") if one["cause"].startswith(CAUSES[what])])
        now = json.loads(outlast("status", run, "--json").stdout)
        text = " ".join(outlast("status", run).stdout.split())
        heal.touch()
    assert job.wait(180) == 0, log.read_text()

    newest = [one for one in events(run, "verdict") if one["ranks"] == [1] and one["cause"]][-1]
    assert newest["cause"].startswith(CAUSES[what]), newest.fields
    assert newest["is_software"]
    if what in ("data", "garbage", "work"):
        assert newest["cause_confidence"] == "likely"
        assert newest["tried"].startswith("nothing: what keeps it was measured"), "no node is suspected for it"
    (story,) = [one for one in now["stories"] if "rank 1" in one["verdict"]]
    assert story["cause"].startswith(CAUSES[what])
    assert story["ruled_out"]
    assert "cause: " in text
    assert "done: nothing: nobody is ended for being slow" in text
    told = [one for one in build_report(run).incidents if one.kind == "verdict" and one.rank == 1]
    assert any(CAUSES[what] in one.detail and "ruled out: " in one.detail for one in told), told
    assert not events(run, "workers_failed")


@pytest.mark.root
@pytest.mark.soak
def test_a_link_at_a_tenth_is_tried_out_and_then_told(tmp_path: Path) -> None:
    """Of four nodes, the one whose adapter is slow; its ranks are as fast as the others."""
    run, heal, drawn = tmp_path / "run", tmp_path / "heal", secrets.token_hex(2)
    subnet = f"10.{96 + int(drawn[:2], 16) % 128}.{int(drawn[2:], 16)}"
    with Cluster(4, "200mbit", prefix=f"o{drawn}", subnet=subnet) as cluster:
        words = ["--nnodes", "4", "--nproc-per-node", "1", "--rdzv-endpoint", f"{cluster.hosts[0].address}:29511"]
        words += ["--run-dir", str(run), *QUICK, str(SCRIPT), "nothing", str(heal), "4000", "384"]
        jobs = []
        for host in cluster.hosts:
            with (tmp_path / host.name).open("w") as log:
                command = [sys.executable, "-m", "outlast", "launch", "--node-rank", str(host.index)]
                command += ["--local-addr", host.address, *words]
                jobs.append(host.popen(command, env=clean_env(OMP_NUM_THREADS="1"), stdout=log, stderr=log))
        wait_for(lambda: run.exists() and len(events(run, "program_step")) > 160, timeout_s=200)
        cluster.hosts[2].set_rate("20mbit")
        (began,) = wait_for(
            lambda: [one for one in events(run, "verdict") if one["syndrome"] == "communication_slow"], timeout_s=200
        )
        now = json.loads(outlast("status", run, "--json").stdout)
        cluster.hosts[2].set_rate("200mbit")
        told = ("communication_slow", "ended")
        wait_for(lambda: told in [(one["syndrome"], one["state"]) for one in events(run, "verdict")], timeout_s=200)
        heal.touch()
        statuses = [job.wait(200) for job in jobs]
    said = [(tmp_path / host.name).read_text() for host in cluster.hosts]
    assert statuses == [0] * 4, said
    assert (began["place"], began["nodes"], began["ranks"]) == ("node", [f"o{drawn}2"], [2]), began.fields
    assert "/s from " in began["tried"]
    assert [one["tried"] for one in now["stories"]] == [began["tried"]]
    (probed,) = events(run, "nodes_probed")
    assert (probed["why"], probed["heard"]) == ("what ranks exchange took longer", 4)
    # all hosts share this machine's cores, which others may use too
    assert all(one["is_software"] for one in events(run, "verdict") if one["syndrome"] != "communication_slow"), said[0]
