"""A rank that becomes slow is named while the job runs, on one node and on two, and ``outlast status`` shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outlast.diagnostics import build_report
from outlast.free_port import free_port
from tests.helpers import events, outlast, start_outlast, wait_for
from tests.launch.jobs import STARTED

SCRIPT = Path(__file__).with_name("watched_program.py")
QUICK = ("--launch.hang-floor-s", "5", "--launch.monitor-interval-s", "0.2", "--launch.node-sample-s", "0")


@pytest.mark.parametrize(
    "nodes",
    [pytest.param(2, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.soak)],
    ids=["2-nodes", "1-node"],
)
def test_it_is_told_with_its_evidence_and_when_it_is_over(tmp_path: Path, nodes: int) -> None:
    """Two ranks, and one is slow from step 20 on, until it was asked what the job does."""
    run, heal, port = tmp_path / "run", tmp_path / "heal", free_port()
    program = (SCRIPT, "120", "--slow", "1", "--slow-from", "20", "--heal", heal)
    logs, jobs = [tmp_path / f"log{node}" for node in range(nodes)], []
    for node, log in enumerate(logs):
        flags = ["--nnodes", str(nodes), "--nproc_per_node", str(2 // nodes), "--run-dir", run, *QUICK]
        if nodes > 1:
            flags += ["--node_rank", str(node), "--local_addr", "127.0.0.1", "--rdzv_backend", "c10d"]
            flags += ["--rdzv_endpoint", f"127.0.0.1:{port}"]
        jobs.append(start_outlast("launch", *flags, *program, log=log))
        STARTED.append(jobs[-1])
    wait_for(lambda: run.exists() and events(run, "verdict"))
    text = outlast("status", run).stdout
    now = json.loads(outlast("status", run, "--json").stdout)
    heal.touch()
    assert [job.wait(120) for job in jobs] == [0] * nodes, [log.read_text() for log in logs]

    assert (now["state"], now["reason"], len(now["ranks"])) == ("running", "", 2)
    for one in now["ranks"]:
        assert (one["state"], one["phase"], one["seen_in"]) == ("running", "program", "shared memory")
        assert one["age_s"] < 60
        assert one["step"] > 20
    (words,) = now["verdicts"]
    assert words.startswith("slow outside communication: rank 1 on ")
    assert " ".join(text.split()).count("rank 1 works") == 1

    began, ended = events(run, "verdict")
    assert (began["state"], ended["state"]) == ("began", "ended")
    assert (began["place"], began["ranks"], began["confidence"]) == ("rank", [1], "likely")
    if nodes > 1:
        assert began["nodes"][0].endswith("(node 1)"), "both nodes have the name of this machine"
    assert abs(began["step"] - 21) <= 4, "the first step of a program is not counted"
    assert began["tried"].startswith("node "), "its node was tried out before it was told"
    said = [log.read_text() for log in logs]
    assert [one.count("nothing is done about it") for one in said] == [1, *([0] * (nodes - 1))], said
    assert said[0].count("as fast as its peers again") == 1
    assert not events(run, "hang_found")
    assert not events(run, "workers_failed")

    done = json.loads(outlast("status", run, "--json").stdout)
    assert (done["state"], done["verdicts"]) == ("finished", [])
    assert [one["doing"] for one in done["ranks"]] == [f"has ended well, after step {done['step']}"] * 2
    assert any(one.kind == "verdict" for one in build_report(run).incidents)


@pytest.mark.soak
@pytest.mark.parametrize("slow_from", [1000], ids=["nobody"])
def test_nobody_is_told_of_while_all_are_alike(tmp_path: Path, slow_from: int) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = ("300", "--slow", "1", "--slow-from", str(slow_from))
    job = start_outlast("launch", "--nproc_per_node", "2", "--run-dir", run, *QUICK, SCRIPT, *words, log=log)
    STARTED.append(job)
    assert job.wait(180) == 0, log.read_text()
    assert events(run, "program_step")
    assert not events(run, "verdict"), log.read_text()


def test_a_run_that_was_never_there(tmp_path: Path) -> None:
    assert "no run directory at" in outlast("status", tmp_path / "nowhere", check=1).stderr
    (tmp_path / "empty").mkdir()
    assert "no job has begun there" in outlast("status", tmp_path / "empty", check=1).stderr
    assert list((tmp_path / "empty").iterdir()) == [], "nothing is made by looking"
