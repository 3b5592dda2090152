"""What a run does now, from its events where its ranks are not on this machine."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from outlast.cli.main import main
from outlast.diagnostics.live import Heartbeat, Recorder, heartbeat_path, ring_path, shm_directory
from outlast.diagnostics.live.shm import clear
from outlast.diagnostics.monitor import NodeCondition
from outlast.diagnostics.report.status import status_of
from outlast.errors import DiagnosticsError
from outlast.events import HangFound, RunEnded, WorkersFailed
from tests.diagnostics.report.synthetic import SyntheticRun, clean
from tests.diagnostics.report.test_first_lines import verdict


def begun(folder: Path, steps: int = 25, **settings: object) -> SyntheticRun:
    """A job of four ranks on two nodes elsewhere, which is in the middle of its steps now."""
    run = SyntheticRun(run_dir=folder, **settings)  # type: ignore[arg-type]
    run.t = time.time() - 0.29 * steps - 4.0
    run.start()
    run.train(1, steps)
    return run


def test_a_job_that_runs_elsewhere(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.launcher(verdict("began", 25), generation=0)
    condition = {"host": "node-b", "what": "swap", "words": "it swapped", "since_t": run.t - 9, "seconds": 9.0}
    run.launcher(NodeCondition(state="lasts", **condition), generation=0, host="node-b")  # type: ignore[arg-type]
    ended = condition | {"what": "disk_slow", "words": "its disk was slow"}
    for state in ("began", "ended"):
        run.launcher(NodeCondition(state=state, **ended), generation=0, host="node-b")  # type: ignore[arg-type]
    now = status_of(tmp_path)
    assert (now.state, now.reason, now.step, now.steps_planned, now.generation) == ("running", "", 25, 60, 0)
    assert [(one.rank, one.host, one.step, one.doing, one.seen_in) for one in now.ranks] == [
        (rank, f"node-{'aabb'[rank]}", 25, "has done step 25", "events") for rank in range(4)
    ]
    assert all(one.age_s is not None and one.age_s < 30 for one in now.ranks)
    assert [(one.host, one.ranks, one.conditions) for one in now.nodes] == [
        ("node-a", (0, 1), ()),
        ("node-b", (2, 3), ("it swapped",)),
    ]
    assert len(now.verdicts) == 1
    run.launcher(verdict("ended", 25), generation=0)
    assert status_of(tmp_path).verdicts == ()
    assert not (tmp_path / "shared_memory.key").exists(), "nothing is made by looking"


def test_a_job_whose_ranks_were_killed_with_their_launchers(tmp_path: Path) -> None:
    run = SyntheticRun(run_dir=tmp_path, ranks=2)
    run.start()
    run.train(1, 12)
    now = status_of(tmp_path)
    assert now.state == "no sign of life"
    assert "none is alive on this machine" in now.reason


def test_finished_failed_and_restarting(tmp_path: Path) -> None:
    clean(tmp_path / "done", ranks=2)
    done = status_of(tmp_path / "done")
    assert (done.state, done.step) == ("finished", 60)
    assert [(one.phase, one.doing) for one in done.ranks] == [("finish", "has ended well, after step 60")] * 2

    noticed = begun(tmp_path / "noticed", ranks=2)
    for log in noticed.logs:
        noticed.write(log, RunEnded(step=25, ok=True, reason="SIGTERM: saved, and ended after step 25"))
    told = status_of(tmp_path / "noticed")
    assert (told.state, told.reason) == ("ended", "SIGTERM: saved, and ended after step 25")

    run = begun(tmp_path / "failed")
    evidence = "stopped (state T); 3 peers have been waiting 9.1 s"
    hang = HangFound(culprit=3, pid=1, step=26, silent_s=9.0, limit_s=8.0, evidence=evidence)
    run.launcher(hang, generation=0, host="node-b")
    reason = f"hung, killed by the launcher: {evidence}"
    for restarting, state in ((True, "restarting"), (False, "failed")):
        event = WorkersFailed(host="node-b", ranks=(3,), reasons=(reason,), restarting=restarting)
        run.launcher(event, generation=0, host="node-b")
        now = status_of(tmp_path / "failed")
        assert (now.state, now.reason) == (state, f"rank 3 on node-b {reason}")
        assert now.verdicts == (f"rank 3 hung in step 26, and was killed: {evidence}",)
    run.t = time.time() - 4.0
    run.start(generation=1, first_step=21)
    again = status_of(tmp_path / "failed")
    assert (again.state, again.generation, again.verdicts, again.step) == ("running", 1, (), 0)
    assert again.ranks[0].doing == "has begun, and done no step"


def test_ranks_on_this_machine_tell_what_they_are_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begun(tmp_path, ranks=2)
    shm = shm_directory(tmp_path)
    try:
        beat, recorder = Heartbeat(heartbeat_path(shm, 0), rank=0), Recorder(ring_path(shm, 0), rank=0, capacity=16)
        beat.beat("step", 26)
        recorder.step = 26
        recorder.enter("all_gather", 64, "gradients")
        (one, other) = status_of(tmp_path).ranks
        assert (one.state, one.phase, one.step, one.seen_in) == ("running", "step", 26, "shared memory")
        assert one.doing.startswith("in all_gather #0 of step 26, for ")
        assert other.seen_in == "events"
        assert main(["status", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert "running, step 26 of 60" in said
        assert "all_gather #0" in said
        assert "1 ranks are not on this machine" in said
        heartbeat_path(shm, 0).write_bytes(b"damaged")
        assert status_of(tmp_path).ranks[0].seen_in == "events"
        beat.close()
        recorder.close()
    finally:
        clear(shm)
    assert main(["status", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"][1]["rank"] == 1
    run.end()


def test_lines_that_are_torn_or_of_a_version_to_come_do_not_matter(tmp_path: Path) -> None:
    begun(tmp_path, ranks=2)
    path = next((tmp_path / "attempts" / "0001" / "events").iterdir())
    with path.open("a") as file:
        file.write('{"v":2,"t":1,"rank":0,"generation":0,"kind":"step","step":99}\n{"v":1,"t":17')
    assert status_of(tmp_path).step == 25


def test_no_such_run(tmp_path: Path) -> None:
    with pytest.raises(DiagnosticsError, match="no run directory at"):
        status_of(tmp_path / "nowhere")
    with pytest.raises(DiagnosticsError, match="no job has begun there"):
        status_of(tmp_path)
    assert list(tmp_path.iterdir()) == []
