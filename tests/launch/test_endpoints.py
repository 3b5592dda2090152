"""Two jobs at one endpoint, and nodes that are lost: one clear line each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from outlast.free_port import free_port
from tests.helpers import clean_env, events, wait_for
from tests.launch.jobs import QUICK, RANK, finish, ranks_of, start, steps, told

SLEEP = ("-c", "import time; time.sleep(300)")


def test_two_jobs_at_one_endpoint(tmp_path: Path) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    flags = {"nproc_per_node": "1", "rdzv_endpoint": f"127.0.0.1:{free_port()}"}
    job = start(first, *SLEEP, flags=flags)
    wait_for(lambda: ranks_of(first))

    # a run of its own, the same id
    said = finish(start(other, *SLEEP, flags=flags), other, status=1)
    assert "its state was not written with this run's secret: another run uses the same endpoint and id" in said

    # the same run: its launcher would be a spare of a job of one node, which can never need it
    (tmp_path / "again").symlink_to(first)
    said = finish(start(tmp_path / "again", *SLEEP, flags=flags), tmp_path / "again", status=1)
    assert f"another job has the rendezvous at {flags['rdzv_endpoint']} with id 'outlast': " in said
    assert f"(launcher {job.pid})" in said

    # another id: it may, and is told what that means
    code = "import os; assert os.environ['OUTLAST_GENERATION'] == '0'; print('job', os.environ['OUTLAST_JOB'])"
    said = finish(start(other, "-c", code, flags={**flags, "rdzv_id": "second"}), other)
    assert "is in a launcher of another job (id outlast): when that job ends, this one (id second) ends too" in said

    job.send_signal(15)
    assert "outlast: " not in finish(job, first, status=143), "the first noticed nothing"
    assert len(events(first, "workers_started")) == 1


def test_a_spare_is_told_that_it_is_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    node = {"nproc_per_node": "1", "nnodes": "2", "rdzv_endpoint": f"127.0.0.1:{free_port()}"}
    words = ("-c", f"import time, pathlib\nwhile not pathlib.Path({str(run / 'end')!r}).exists(): time.sleep(0.05)")
    two = [start(run, *words, flags=node) for _ in range(2)]
    wait_for(lambda: len(events(run, "workers_started")) == 2)
    spare = start(run, *words, flags=node)
    wait_for(lambda: "has all its 2 nodes: " in told(run))
    assert "this launcher is a spare, and waits until one of them leaves or the job ends" in told(run)
    spare.send_signal(15)
    finish(spare, run, status=143)
    (run / "end").touch()
    for job in two:
        finish(job, run)
    assert len(events(run, "workers_started")) == 2, "the two noticed nothing"


def test_the_node_of_the_store_is_lost(tmp_path: Path) -> None:
    """A launcher that loads torch itself: torch's stores print frames of C++ otherwise."""
    run = tmp_path / "run"
    run.mkdir()
    endpoint = f"127.0.0.1:{free_port()}"
    node: dict[str, Any] = {"nproc_per_node": "1", "nnodes": "2", "rdzv_endpoint": endpoint}
    holder = start(run, *SLEEP, flags={**node, "rdzv_conf": "is_host=true"})
    spec = {
        "command": [sys.executable, *SLEEP],
        "run_dir": str(run),
        "flags": {**node, "rdzv_conf": "is_host=false"},
        "config": QUICK,
    }
    code = "import sys; from tests.launch.launcher import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(spec)],
        env=clean_env(PYTHONPATH=str(Path(__file__).parents[2])),
        stderr=subprocess.PIPE,
        text=True,
    ) as other:
        wait_for(lambda: len(events(run, "workers_started")) == 2)
        holder.kill()
        _, said = other.communicate(timeout=60)
    lines = said.splitlines()
    assert other.returncode == 1
    assert f"LaunchError: the rendezvous at {endpoint} (id outlast) is lost: the launcher there has ended" in lines[0]
    assert len(lines) == 2, said
    assert "start the job again on all nodes: training goes on from the newest checkpoint" in lines[1]


def test_a_node_is_lost(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    more = "join_timeout=6,keep_alive_interval=1"
    node = {"nproc_per_node": "1", "nnodes": "2", "rdzv_endpoint": f"127.0.0.1:{free_port()}", "rdzv_conf": more}
    words = (RANK, str(run), "4000")
    holder = start(run, *words, flags={**node, "rdzv_conf": f"{more},is_host=true"})
    lost = start(run, *words, flags={**node, "rdzv_conf": f"{more},is_host=false"})
    wait_for(lambda: (run / "steps").exists() and len(steps(run)) > 8)
    lost.kill()
    said = finish(holder, run, status=1)
    assert "LaunchError: too few nodes at the rendezvous at " in said
    assert "1 of 2 nodes are here: " in said
    assert f"(launcher {lost.pid}), last heard of " in said
    assert "lets the others go on without a node" in said
