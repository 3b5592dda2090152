"""``checkpoint.every_steps = "auto"``: two real ranks save after the same steps, and a failure is seen after it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.helpers import events, outlast, start_outlast, steps_saved, tiny_config, wait_for

AUTO = ["--nproc-per-node", "2", "--checkpoint.every-steps", "auto"]


def saved_by(run: Path, rank: int) -> list[int]:
    return [record["step"] for record in events(run, "checkpoint_saved") if record.rank == rank]


def test_all_ranks_save_when_rank_0_says_so_and_it_says_why(tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    outlast("launch", config, *AUTO, "--trainer.steps", "60", "--checkpoint.rank-mtbf-h", "0.0005")
    assert saved_by(run, 0) == saved_by(run, 1) == steps_saved(run)
    assert steps_saved(run)[0] == 7
    assert steps_saved(run)[-1] == 60
    told = events(run, "checkpoint_interval")
    assert {record.rank for record in told} == {0}
    assert all(record["every_steps"] >= 1 and record["cost_s"] > 0 for record in told)
    assert all("0 seen" in record["why"] for record in told)
    log = (run / "attempts" / "0001" / "logs" / "rank_00000.log").read_text()
    assert f"a checkpoint every {told[0]['every_steps']} steps: a save costs" in log


@pytest.mark.slow
def test_a_failure_is_seen_by_the_next_start(tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    job = start_outlast("launch", config, *AUTO, "--trainer.steps", "400", log=tmp_path / "log")
    wait_for(lambda: events(run, "checkpoint_interval"), every_s=0.05)
    os.kill(next(r["pid"] for r in events(run, "run_started") if r.rank == 1), signal.SIGKILL)
    assert job.wait(timeout=120) == 0, (tmp_path / "log").read_text()[-4000:]
    first, *_, last = events(run, "checkpoint_interval")
    assert "0 seen" in first["why"]
    assert "1 seen" in last["why"]
    assert last["mtbf_s"] < first["mtbf_s"] / 10, "a failure within seconds weighs more than what was expected"
    assert steps_saved(run)[-1] == 400
