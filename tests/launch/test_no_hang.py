"""What is no hang, under the whole launcher."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from tests.helpers import events, steps_saved, tiny_config, wait_for
from tests.launch.jobs import HERE, RANK, finish, ranks_of, start, steps


def test_an_evaluation_that_is_longer_than_the_limit_of_a_hang(tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    words = (str(HERE / "slow_evaluation.py"), "5", str(config), "--trainer.steps", "6")
    finish(start(run, *words, obeys_notice=True, alone_limit_s=60.0), run)
    assert events(run, "hang_found") == events(run, "workers_failed") == []
    assert steps_saved(run)[-1] == 6


def test_a_rank_that_is_continued_just_after_the_limit(tmp_path: Path) -> None:
    """It is spared or killed itself; its peer, which waits for it, is not at fault."""
    run = tmp_path / "run"
    job = start(run, RANK, str(run), "30")
    wait_for(lambda: (run / "steps").exists() and len(steps(run)) > 12)
    stopped = ranks_of(run)[1]
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(2.4)  # the limit is 2 s
    with contextlib.suppress(ProcessLookupError):
        os.kill(stopped, signal.SIGCONT)
    finish(job, run)
    assert all(hang["culprit"] == 1 for hang in events(run, "hang_found"))
