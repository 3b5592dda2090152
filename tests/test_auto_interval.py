"""``checkpoint.every_steps = "auto"``: two real ranks save after the same steps, and a failure is seen after it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.helpers import events, start_outlast, steps_saved, tiny_config, wait_for


def test_all_ranks_save_when_rank_0_says_so_and_failures_count(tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    words = ["--nproc-per-node", "2", "--checkpoint.every-steps", "auto", "--trainer.steps", "120"]
    job = start_outlast("launch", config, *words, log=tmp_path / "log")
    first = wait_for(lambda: events(run, "checkpoint_interval"), every_s=0.02)[0]
    assert steps_saved(run)[0] == 7 < first["step"], "what a save costs shows only when one is made"
    os.kill(next(r["pid"] for r in events(run, "run_started") if r.rank == 1), signal.SIGKILL)
    assert job.wait(timeout=120) == 0, (tmp_path / "log").read_text()[-4000:]

    saved = [[r["step"] for r in events(run, "checkpoint_saved") if r.rank == rank] for rank in (0, 1)]
    assert saved[0] == steps_saved(run)
    assert {7, *saved[1]} == set(saved[0])  # rank 1 may have been killed before it told of its part of step 7
    assert saved[0][:2] == [7, 14]
    assert saved[0][-1] == 120
    told = events(run, "checkpoint_interval")
    assert {record.rank for record in told} == {0}
    assert all(record["every_steps"] >= 1 and record["cost_s"] > 0 for record in told)
    assert "0 seen" in first["why"]
    assert "1 seen" in told[-1]["why"]
    assert told[-1]["mtbf_s"] < first["mtbf_s"] / 10, "a failure within seconds outweighs thousands of hours expected"
    log = (run / "attempts" / "0001" / "logs" / "rank_00000.log").read_text()
    assert f"a checkpoint every {first['every_steps']} steps: a save costs" in log
