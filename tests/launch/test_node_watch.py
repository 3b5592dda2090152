"""What slowed a rank is named by the report, and watching the node changes nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from outlast.errors import OutOfRange
from outlast.events import EventLog
from outlast.launch import LaunchConfig
from outlast.launch.node_watch import NodeWatch
from tests.cpu_quota import quota_group
from tests.helpers import events, outlast, start_outlast, tiny_config, wait_for

SLOW_S = 6.0


@pytest.mark.soak
@pytest.mark.root
def test_the_report_names_the_quota_that_slowed_a_rank(tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    log = tmp_path / "log"
    words = ["--trainer.steps", "150", "--nproc-per-node", "2", "--launch.node_sample_s", "0.5"]
    try:
        with quota_group(0.05) as group:
            job = start_outlast("launch", str(config), *words, log=log)
            try:
                wait_for(lambda: len(events(run, "step")) > 40, timeout_s=200)
                (started,) = events(run, "workers_started")
                (group / "cgroup.procs").write_text(str(started["pids"][1]))
                time.sleep(SLOW_S)
                (group.parent / "cgroup.procs").write_text(str(started["pids"][1]))
                assert job.wait(200) == 0, log.read_text()[-3000:]
            finally:
                job.kill()
    except OSError as error:
        pytest.skip(f"no CPU cgroup can be made here: {error}")
    first = " ".join(outlast("report", run).stdout.partition("\n\n")[0].split())  # it is wrapped
    assert "rank 1" in first
    assert "was throttled (CPU quota of 0.05 cores), for " in first, first
    told = [one for one in events(run, "node_condition") if one["what"] == "cpu_throttled"]
    assert (told[0]["state"], told[-1]["state"]) == ("began", "ended")
    assert {tuple(one["ranks"]) for one in told} == {(1,)}
    (cost,) = events(run, "node_monitored")
    assert cost["cpu_s"] / cost["samples"] < 0.1


@pytest.mark.parametrize("interval_s", [0.0, 0.05])
def test_a_node_that_is_watched_says_what_it_saw_and_one_that_is_not_writes_nothing(
    tmp_path: Path, interval_s: float
) -> None:
    run = tmp_path / "run"
    (run / "events").mkdir(parents=True)
    with EventLog(run / "events" / "agent_a.jsonl", rank=-1) as log:
        node = NodeWatch(run, LaunchConfig(node_sample_s=interval_s), log, "a")
        node.begin({0: os.getpid()})
        time.sleep(0.5)
        node.rest()
        node.close()
        node.close()
    told = events(run, "node_monitored")
    assert len(told) == (interval_s > 0)
    for one in told:
        assert one["samples"] > 1
        assert all(isinstance(why, str) and why for why in one["absent"].values())


def test_the_setting_is_checked() -> None:
    with pytest.raises(OutOfRange, match="node_sample_s"):
        LaunchConfig(node_sample_s=-1)
