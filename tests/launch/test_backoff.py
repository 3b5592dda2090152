"""How long the launcher waits before it restarts ranks that fail again and again."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil

from outlast.launch.backoff import Backoff
from tests.helpers import events, wait_for
from tests.launch.jobs import RANK, finish, ranks_of, start, told


def test_starts_that_get_nowhere_wait_twice_as_long_each_time() -> None:
    backoff = Backoff(1.0, 60.0)
    waits = [backoff.after(0, 0.5) for _ in range(20)]
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0] + [60.0] * 14
    assert backoff.after(7, 0.5) == 0.0, "it got further"
    assert [backoff.after(7, 0.5), backoff.after(6, 900.0), backoff.after(8, 0.5)] == [1.0, 2.0, 0.0]


def test_where_nothing_says_how_far_time_does() -> None:
    backoff = Backoff(1.0, 60.0)
    assert [backoff.after(None, 1.0), backoff.after(None, 59.0), backoff.after(None, 61.0)] == [1.0, 2.0, 0.0]


def test_failures_at_import_do_not_use_up_the_restarts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(run, "-c", "import a_module_that_is_not_there", max_restarts=20, backoff_s=0.2, longest_backoff_s=99.0)
    wait_for(lambda: "4 times in a row" in told(run))
    times = [one.t for one in events(run, "workers_started")]
    assert len(times) == 4
    assert all(later - before > wait for before, later, wait in zip(times, times[1:], (0.2, 0.4, 0.8), strict=False))
    assert not any(psutil.pid_exists(pid) for pid in ranks_of(run))
    job.send_signal(signal.SIGTERM)  # in the wait of 1.6 s
    said = finish(job, run, status=128 + signal.SIGTERM)
    assert (
        "the ranks failed before their first step, 3 times in a row; restarting them in 0.8 s (launch.backoff_s); 17 "
        "restarts left after this; Ctrl-C, or SIGTERM to this launcher, ends the job"
    ) in said


def test_a_rank_that_fails_at_the_same_step_each_time(tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = finish(
        start(run, RANK, str(run), "8", "--rank", "1", "--at", "3", "--do", "raise", max_restarts=2), run, status=1
    )
    assert "restarting the ranks; 1 restarts left after this" in said, "the first one got somewhere"
    assert "the ranks failed no further than step 3; restarting them in 0.1 s" in said
