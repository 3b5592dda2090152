"""Lightning on two ranks, with compressed gradients: killed with SIGKILL it ends bit for bit as a run that was not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from outlast.launch.failures import RESUME_STATUS
from tests.helpers import events, outlast, steps_saved

pytest.importorskip("lightning", reason="lightning is not installed: pip install 'outlast[lightning]'")

PROGRAM = Path(__file__).with_name("lightning_program.py")
QUICK = ("--launch.backoff-s", "0", "--launch.monitor-interval-s", "0.1")


def launched(run: Path, *words: str | Path, restarts: int = 0, status: int = 0) -> tuple[float, str]:
    """The last validation's loss, and the rest of what it ends with."""
    flags = ("--nproc-per-node", "2", "--max-restarts", str(restarts), "--run-dir", run, *QUICK)
    said = outlast("launch", *flags, PROGRAM, run, *words, check=status, timeout_s=300).stdout
    found = re.search(r"loss ([\d.]+)\nend (.*)", said)
    return (float(found[1]), found[2]) if found else (0.0, said)


@pytest.mark.soak
def test_compressed_killed_and_noticed(tmp_path: Path) -> None:
    """Killed inside an epoch, and in another one; in the last one a notice comes."""
    loss, straight = launched(tmp_path / "straight")
    kills = tmp_path / "kills"
    kills.mkdir()
    for name in ("7-0", "14-1"):
        (kills / name).touch()
    run = tmp_path / "run"
    assert launched(run, "--kills", kills, "--notice-at", "22", restarts=2, status=RESUME_STATUS)[0] == 0.0
    assert not list(kills.iterdir())
    assert 22 <= steps_saved(run)[-1] <= 26
    assert launched(run) == (loss, straight)
    assert len(events(run, "workers_failed")) == 2
    steps = [one for one in events(run, "step") if one.rank == 0]
    assert {one["step"] for one in steps} == set(range(1, steps_saved(run)[-1] + 1))
    assert all(one["loss"] > 0 for one in steps)
    assert sum(one["wire_bytes"] for one in steps) < 0.5 * sum(one["dense_bytes"] for one in steps)


@pytest.mark.soak
def test_it_learns_as_dense_does(tmp_path: Path) -> None:
    """Dense it is Lightning alone."""
    dense, _ = launched(tmp_path / "dense", "--characters", "--plain")
    loss, _ = launched(tmp_path / "run", "--characters", "--comm", "0.05")
    assert dense < 3.0, "of 5.5 at the start"
    assert loss < 1.02 * dense
