"""A run whose own directory fills up goes on: events and log lines that are lost are counted, and told later."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.checkpoint.helpers import small_disk
from tests.helpers import events, outlast, start_outlast, tiny_config, wait_for

pytestmark = pytest.mark.root
LOST = "events are being lost, training goes on"


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Without any room."""
    filler = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
    try:
        for nbytes in (4096, 1):
            with suppress(OSError):
                while True:
                    os.write(filler, bytes(nbytes))
        assert os.statvfs(disk).f_bfree == 0
        yield
    finally:
        os.close(filler)
        os.unlink(disk / "filler")


@pytest.mark.parametrize("verb", ["train", "launch"])
def test_the_runs_directory_fills_up(tmp_path: Path, verb: str) -> None:
    config, _ = tiny_config(tmp_path)
    disk, log = tmp_path / "disk", tmp_path / "log"
    run = disk / "run"
    words = ["--run.dir", str(run), "--checkpoint.url", str(tmp_path / "checkpoints"), "--trainer.log-every-steps", "1"]
    words += ["--nproc-per-node", "2"] if verb == "launch" else []
    steps = ["--trainer.steps", "120", "--checkpoint.every-steps", "60"]
    with small_disk(disk, "1m"):
        job = start_outlast(verb, config, *words, *steps, log=log)
        wait_for(lambda: events(run, "step"), every_s=0.05)
        with filled(disk):
            wait_for(lambda: LOST in log.read_text(), every_s=0.02)
        assert job.wait(120) == 0
        said = log.read_text()
        assert "Traceback" not in said
        assert "Logging error" not in said
        lost = [record for record in events(run, "events_lost") if record.rank == 0]
        assert lost
        assert all("disk is not full" in record["reason"] or "No space" in record["reason"] for record in lost)
        kept = sum(record.rank == 0 for record in events(run, "step"))
        assert kept < 120 <= kept + sum(record["count"] for record in lost)
        own = (run / "attempts/0001/logs/rank_00000.log").read_text()
        assert ("lines before this one could not be written" in own) == ("lines of the log are being lost" in said)
        told = outlast("report", run).stdout
        assert "events of rank 0 were lost before this" in told
