"""Other examples with a session: they learn, and a rank that is killed makes no difference to how they end."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.helpers import events, outlast, start_outlast, steps_saved, wait_for

QUICK = ("--launch.backoff-s", "0", "--launch.monitor-interval-s", "0.1")
NEVER_SEEDED = ("rng/numpy", "rng/python")
"""States that nothing seeds or uses, so that each start has others."""


def differing(one: Path, other: Path, step: int) -> tuple[set[str], int]:
    """What the step's checkpoints of two runs do not share, and how many tensors they do."""
    words = ["--step", str(step), "--other-step", str(step), "--json"]
    folders = [run / "checkpoints" for run in (one, other)]
    compared = json.loads(outlast("ckpt", "diff", *folders, *words, check=None).stdout)
    names = {difference["name"] for kind in ("tensors", "values") for difference in compared[kind]}
    return {name for name in names if not name.startswith(NEVER_SEEDED)}, len(compared["equal_tensors"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "measure", "steps"),
    [("gan", "distance", 100), pytest.param("fsdp_loop", "loss", 60, marks=pytest.mark.soak)],
)
def test_it_learns_and_ends_the_same(root: Path, tmp_path: Path, example: str, measure: str, steps: int) -> None:
    """Two models with an optimizer each, and sharded parameters; dropout and drawn points included."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    log = tmp_path / "log"

    def words(run: Path) -> list[str | Path]:
        flags = ["--nproc-per-node", "2", "--max-restarts", "1", "--run-dir", run, *QUICK]
        return ["launch", *flags, root / "examples" / f"{example}.py", run, "--steps", str(steps)]

    said = outlast(*words(straight)).stdout
    found = [float(number) for number in re.findall(rf"{measure} ([\d.]+)", said)]
    assert found[-1] < found[0] / 3
    job = start_outlast(*words(killed), log=log)
    wait_for(lambda: 20 in steps_saved(killed))
    (rank,) = {one["pid"] for one in events(killed, "run_started") if one.rank == 1}  # launcher and session tell it
    os.kill(rank, signal.SIGKILL)
    assert job.wait(120) == 0, log.read_text()[-4000:]
    assert len(events(killed, "workers_failed")) == 1
    assert re.search(r"goes on after step [2-9]0", log.read_text())
    unequal, equal = differing(straight, killed, steps)
    assert not unequal
    assert equal > 15
