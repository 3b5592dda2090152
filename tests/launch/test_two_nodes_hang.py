"""A rank that hangs on one node is named by the launchers of both, as soon as on a single node, and its own ends it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from outlast.diagnostics import build_report
from outlast.diagnostics.trace.run_trace import write_trace
from outlast.free_port import free_port
from tests.forked import Job
from tests.helpers import clean_env, events, wait_for
from tests.launch.jobs import HERE, QUICK, RANK, STARTED, steps


def start_node(run: Path, node: int, port: int, *words: str) -> tuple[Job, Path]:
    """The launcher of one rank on one of two nodes, and its log."""
    flags = {"nproc_per_node": "1", "nnodes": "2", "node_rank": node, "rdzv_endpoint": f"127.0.0.1:{port}"}
    told = {
        "command": [sys.executable, *words],
        "run_dir": str(run),
        "flags": {**flags, "local_addr": "127.0.0.1"},
        "config": {**QUICK, "node_sample_s": 0.2},
    }
    log = run.parent / f"node{node}.log"
    env = clean_env(PYTHONPATH=str(HERE.parent.parent))
    job = Job("tests.launch.launcher", [json.dumps(told)], env=env, stdout=log, stderr=log)
    STARTED.append(job)
    return job, log


@pytest.mark.slow
def test_a_rank_that_hangs_on_the_other_node(tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    run.mkdir()
    # Rank 1 sleeps outside any collective: its own launcher cannot know that anybody waits for it.
    words = [RANK, str(run), "80", "--rank", "1", "--at", "20", "--do", "spin", "--once"]
    (first, log0), (second, log1) = (start_node(run, node, port, *words) for node in (0, 1))
    wait_for(lambda: len(events(run, "hang_found")) == 1, timeout_s=120)
    wait_for(lambda: (1, 1, 40) in steps(run), timeout_s=120)
    stopped = [one["pids"][0] for one in events(run, "workers_started") if 1 in one["ranks"]][-1]
    os.kill(stopped, signal.SIGSTOP)
    assert [first.wait(120), second.wait(120)] == [0, 0], log0.read_text() + log1.read_text()
    said0, said1 = log0.read_text(), log1.read_text()
    slept, halted = events(run, "hang_found")
    assert (slept["culprit"], halted["culprit"]) == (1, 1)
    assert "judged from the ranks of all nodes" in slept["evidence"]
    assert "1 peer has been waiting" in slept["evidence"]
    assert slept["silent_s"] < 30, "not together_limit_s (90 s), and not startup_limit_s (600 s)"
    assert "stopped (state T)" in halted["evidence"]
    assert said0.count("outlast: rank 1 on node 1 (") == 2, said0
    assert "stopped (state T)" in said0
    assert "killing it" not in said0, "only the culprit's node acts"
    assert said1.count("killing it") == 2
    waited = [one for one in events(run, "collectives_kept") if one["of_rank"] == 0]
    assert len(waited) == 2, "the launcher of the node that only waits keeps its collectives, too"
    assert all(one["newest"][-1][6] is None for one in waited), "as they were before the culprit was killed"
    assert write_trace(run, tmp_path / "trace.json").arrows == 2


@pytest.mark.soak
def test_when_all_stand_still_nodes_and_links_are_tried_out(tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    run.mkdir()
    words = [RANK, str(run), "60", "--at", "40", "--all", "--do", "wait:25"]
    nodes = [start_node(run, node, port, *words) for node in (0, 1)]
    assert [job.wait(240) for job, _ in nodes] == [0, 0], [log.read_text() for _, log in nodes]
    assert not events(run, "hang_found")
    (probed,) = events(run, "nodes_probed")
    assert (probed["nodes"], probed["heard"]) == (2, 2)
    assert "nodes and links were tried out" in nodes[0][1].read_text()
    assert "tried out" not in nodes[1][1].read_text(), "node 0 says it for all"
    assert [one.title for one in build_report(run).incidents if one.kind == "nodes_probed"]


@pytest.mark.soak
@pytest.mark.parametrize("whom", ["the launcher of node 0", "the launcher of node 1", "all launchers and ranks"])
def test_nobody_is_accused_after_launchers_stood_still(tmp_path: Path, whom: str) -> None:
    run, port = tmp_path / "run", free_port()
    run.mkdir()
    (run / "steps").touch()
    words = [RANK, str(run), "300"]
    nodes = [start_node(run, node, port, *words) for node in (0, 1)]
    wait_for(lambda: (0, 1, 40) in steps(run), timeout_s=120)
    launchers = [job.pid for job, _ in nodes]
    ranks = [pid for one in events(run, "workers_started") for pid in one["pids"]]
    pids = {"the launcher of node 0": launchers[:1], "the launcher of node 1": launchers[1:]}.get(
        whom, launchers + ranks
    )
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(8.0)  # four times hang_floor_s
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    assert [job.wait(120) for job, _ in nodes] == [0, 0], [log.read_text() for _, log in nodes]
    assert not events(run, "hang_found")
    assert all("on node" not in log.read_text() for _, log in nodes)
