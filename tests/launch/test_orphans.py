"""What ranks leave behind, for every way in which they or their launcher end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from outlast.launch.orphans import MARK, end_orphans
from tests.helpers import wait_for
from tests.launch.jobs import HERE, finish, start, told

PARENT = str(HERE / "parent.py")
OURS = ("worker", "shell", "wiped")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "run"
    for pid in started(tmp_path / "run").values():
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)


def started(run: Path) -> dict[str, int]:
    """The processes of the one rank."""
    file = run / "pids"
    lines = file.read_text().splitlines() if file.exists() else []
    return {name: int(pid) for name, pid in map(str.split, lines)}


def alive(pids: dict[str, int]) -> list[str]:
    """Those that live; a shell lives as long as one of its children."""
    found = []
    for name, pid in pids.items():
        try:
            gone = psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            gone = True
        found += [] if gone else [name]
    return found


@pytest.mark.parametrize("how", ["kill", "exit:1"])
def test_nothing_outlives_a_rank_that_failed(run: Path, how: str) -> None:
    said = finish(start(run, PARENT, str(run), how, flags={"nproc_per_node": "1"}, max_restarts=0), run, status=1)
    assert alive(started(run)) == ["daemon"], "what was started without the mark, in another session, is not ours"
    assert "outlast: ended what the ranks had left behind: " in said
    assert f"{started(run)['worker']} (" in said
    assert "(sleep 300)" in said, "children of children too"


def test_nothing_outlives_a_launcher_that_is_killed(run: Path) -> None:
    job = start(run, PARENT, str(run), "stay", flags={"nproc_per_node": "1"})
    pids = wait_for(lambda: started(run))
    assert len(alive(pids)) == 5
    job.kill()
    wait_for(lambda: alive(pids) == ["daemon"])
    wait_for(lambda: "the launcher has gone; its ranks' processes were ended: " in told(run))


def test_nothing_outlives_a_launcher_that_is_told_to_end(run: Path) -> None:
    job = start(run, PARENT, str(run), "stay", flags={"nproc_per_node": "1"})
    pids = wait_for(lambda: started(run))
    job.send_signal(signal.SIGTERM)
    finish(job, run, status=128 + signal.SIGTERM)
    assert alive(pids) == ["daemon"]


def test_what_ranks_that_succeeded_leave_is_told_and_goes_on(run: Path) -> None:
    said = finish(start(run, PARENT, str(run), "exit:0", flags={"nproc_per_node": "1"}), run)
    assert set(alive(started(run))) == {*OURS, "daemon"}
    assert "outlast: the ranks have ended, but not what they started: " in said
    mark = psutil.Process(started(run)["worker"]).environ()[MARK]
    assert {one.pid for one in end_orphans(mark, {})[0]} >= {started(run)[name] for name in ("worker", "shell")}
