"""Two jobs in one place: real processes, on one machine or as if on two."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from outlast.checkpoint.tools import list_steps, verify
from tests.checkpoint.damage import files_of, steps_at
from tests.checkpoint.ownership.job import Job
from tests.checkpoint.s3 import BUCKET, Server


def lease_of(url: Path) -> Path:
    (path,) = url.glob("lease_*.json")
    return path


def as_if_elsewhere(url: Path, **changes: object) -> None:
    """The holder was a process of another machine, whose pids mean nothing here."""
    path = lease_of(url)
    record = json.loads(path.read_text())
    record["holder"] |= {"machine": "another:pid:[1]", "host": "node-b"}
    record |= changes
    path.write_text(json.dumps(record).ljust(2048))


@pytest.mark.parametrize("restores", [False, True])
def test_the_second_is_told_who_has_the_place(tmp_path: Path, restores: bool) -> None:
    url = tmp_path / "run"
    with Job(url) as first, Job(url) as second:
        assert first.tell("save 1")["saved"] == [1]
        if restores:
            assert second.tell("restore auto")["step"] == 1
        # Whether it goes on or begins anew.
        error = second.tell("step" if restores else "save 2")["error"]
        for part in (
            "PlaceInUse",
            str(url),
            f"process {first.pid} on {socket.gethostname()}",
            "since 2",
            "stop that job",
        ):
            assert part in error
        assert first.tell("save 2")["saved"] == [1, 2]
        assert first.tell("save 3")["saved"] == [1, 2, 3]
        assert first.tell("close")["failed"] == []
        # Now it may.
        if restores:
            assert "has saved steps 2, 3 since this one restored step 1" in second.tell("step")["error"]
            assert second.tell("restore auto")["step"] == 3
            assert second.tell("save 4")["saved"] == [4]
        second.tell("close")
    assert verify(url).ok
    assert not list(url.glob("lease_*"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_who_died_here_lets_go_at_once_and_who_stands_still_does_not(tmp_path: Path, how: signal.Signals) -> None:
    url = tmp_path / "run"
    with Job(url, lease_s=600.0) as first, Job(url) as second:
        first.tell("save 1")
        first.kill(how)
        assert second.tell("restore auto")["step"] == 1
        answer = second.tell("save 2")
        if how == signal.SIGKILL:
            assert answer["saved"] == [2]
            second.tell("close")
            assert steps_at(url) == ["step_00000001", "step_00000002"]
        else:
            assert f"process {first.pid}" in answer["error"]
            first.kill(signal.SIGCONT)
            assert first.tell("save 2")["saved"] == [1, 2]


def test_a_dead_node_lets_go_when_its_lease_ends(tmp_path: Path) -> None:
    url = tmp_path / "run"
    with Job(url) as first, Job(url) as second:
        first.tell("save 1")
        first.kill()
        as_if_elsewhere(url, lease_s=2.0)
        second.tell("restore auto")
        assert second.tell("save 2")["saved"] == [2]
        second.tell("close")
    # Nobody has seen it die, so the number stays, for the case that it comes back.
    assert json.loads(lease_of(url).read_text())["released"] is True
    with Job(url) as third:
        third.tell("restore auto")
        assert third.tell("save 3")["saved"] == [3]
        assert lease_of(url).name == "lease_00000003.json"


def test_who_lives_on_another_node_is_seen_by_its_renewals(tmp_path: Path) -> None:
    """Both run here; the second does not know the first one's machine, so that it can only watch the file."""
    url = tmp_path / "run"
    with Job(url, lease_s=3.0) as first, Job(url) as second:
        first.tell("save 1")
        as_if_elsewhere(url, lease_s=60.0)
        second.tell("restore auto")
        assert f"process {first.pid}" in second.tell("save 2")["error"]
        assert first.tell("save 2")["saved"] == [1, 2]


def test_who_comes_back_late_commits_nothing_and_says_who_took_over(tmp_path: Path) -> None:
    """It stood still, or was cut off from the storage, until its lease had ended."""
    url = tmp_path / "run"
    with Job(url, lease_s=600.0) as first, Job(url) as second:
        first.tell("save 1")
        as_if_elsewhere(url, lease_s=1.0)
        second.tell("restore auto")
        assert second.tell("save 2")["saved"] == [2]
        late = first.tell("save 2")
        assert f"taken over by process {second.pid}" in late["error"] + " ".join(late["failed"])
        assert late["saved"] == [1]
        assert "taken over" in first.tell("step")["error"]
        assert second.tell("save 3")["saved"] == [2, 3]
        second.tell("close")
        assert "taken over" in first.tell("save 9")["error"]
    assert [info.step for info in list_steps(url)] == [1, 2, 3]
    assert verify(url).ok


def test_nobody_took_over_so_it_goes_on(tmp_path: Path) -> None:
    """The lease could not be renewed for longer than it lasts; then somebody removes it by hand."""
    url = tmp_path / "run"
    with Job(url, lease_s=600.0) as job:
        job.tell("save 1")
        as_if_elsewhere(url, renewed=0.0)
        assert job.tell("save 2")["saved"] == [1, 2]
        lease_of(url).unlink()
        assert job.tell("save 3")["saved"] == [1, 2, 3]
        assert job.tell("close")["failed"] == []
    assert steps_at(url) == ["step_00000001", "step_00000002", "step_00000003"]


@pytest.mark.parametrize("how", ["launcher", pytest.param("slurm", marks=pytest.mark.soak)])
def test_a_restart_of_the_same_job_on_another_node_does_not_wait(tmp_path: Path, how: str) -> None:
    url = tmp_path / "run"
    before = {"OUTLAST_JOB": "a7"} if how == "launcher" else {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    after = {"OUTLAST_GENERATION": "1"} if how == "launcher" else {"SLURM_RESTART_COUNT": "1"}
    with Job(url, before, lease_s=600.0) as first:
        first.tell("save 1")
        first.kill()
        as_if_elsewhere(url)
        with Job(url, before | after) as second:
            second.tell("restore auto")
            assert second.tell("save 2")["saved"] == [2]
    # Another job waits, and is not let in while the lease lasts.
    with Job(tmp_path / "other", before) as first, Job(tmp_path / "other", {"OUTLAST_JOB": "b8"}) as second:
        first.tell("save 1")
        assert "job" in second.tell("claim")["error"]


def test_one_process_may_open_its_place_again(tmp_path: Path) -> None:
    """As in a notebook; the older one has lost it."""
    from outlast.errors import PlaceInUse
    from tests.checkpoint.helpers import checkpointer, save_and_join
    from tests.checkpoint.states import local, state

    older, newer = checkpointer(tmp_path), checkpointer(tmp_path, attempt_id="two")
    save_and_join(older, 1, state(1))
    save_and_join(newer, 2, state(2))
    with pytest.raises(PlaceInUse, match=f"taken over by process {os.getpid()}"):
        older.save(3, replicated=state(3), local=local(3))
    newer.close()
    older.abort()
    assert steps_at(tmp_path) == ["step_00000001", "step_00000002"]


def test_a_half_written_lease_is_nobody_s(tmp_path: Path) -> None:
    (tmp_path / "lease_00000007.json").write_text('{"v": 1, "hol')
    with Job(tmp_path) as job:
        assert job.tell("save 1")["saved"] == [1]
        assert lease_of(tmp_path).name == "lease_00000008.json"


def test_in_an_object_store(s3_server: Server, tmp_path: Path) -> None:
    with s3_server.used():
        url = f"s3://{BUCKET}/{tmp_path.name}"
        with Job(url) as first, Job(url) as second:
            assert first.tell("save 1")["saved"] == [1]
            second.tell("restore auto")
            assert f"process {first.pid}" in second.tell("save 2")["error"]
            assert first.tell("save 2")["saved"] == [1, 2]
            first.kill()
            assert second.tell("restore auto")["step"] == 2
            assert second.tell("save 3")["saved"] == [3]
            assert second.tell("close")["failed"] == []


def test_of_many_that_start_at_once_one_has_the_place(tmp_path: Path) -> None:
    from contextlib import ExitStack

    with ExitStack() as stack:
        jobs = [stack.enter_context(Job(tmp_path / "run")) for _ in range(4)]
        for job in jobs:
            assert job._process.stdin is not None
            job._process.stdin.write("claim\n")
            job._process.stdin.flush()
        answers = [job._answer() for job in jobs]
        (owner,) = [job for job, answer in zip(jobs, answers, strict=True) if "error" not in answer]
        assert all(f"process {owner.pid}" in answer["error"] for answer in answers if "error" in answer)
        assert owner.tell("save 1")["saved"] == [1]
    assert len(files_of(tmp_path / "run")) > 1
