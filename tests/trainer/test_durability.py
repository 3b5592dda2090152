"""A run whose last checkpoint is not in storage does not end with status 0, and says what is there."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from outlast.checkpoint.durability import Durability
from outlast.errors import NotDurable
from outlast.events import CheckpointFailed, CheckpointRestored, CheckpointSaved, Event
from tests.helpers import events, outlast, start_outlast, steps_saved, tiny_config, wait_for


def saved(step: int, tier: str = "storage") -> CheckpointSaved:
    return CheckpointSaved(step=step, committed=True, tier=tier, size_bytes=1, blocked_s=0.0, durable_s=0.0)


def failed(step: int, tier: str = "storage") -> CheckpointFailed:
    return CheckpointFailed(step=step, reason="No space left on device", tier=tier)


def restored(step: int, tier: str) -> CheckpointRestored:
    return CheckpointRestored(step=step, url="", seconds=0.0, tiers={tier: 100})


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        ([], ""),
        ([saved(5)], ""),
        ([failed(5), saved(10)], ""),
        ([saved(5), failed(10, "partner")], ""),
        ([saved(5), failed(10)], r"step 10 is not durable \(the newest that is: step 5\): No space left"),
        ([failed(5), failed(10)], r"step 10 is not durable \(nothing that this process saved is\)"),
        ([restored(5, "storage"), failed(10)], r"the newest that is: step 5"),
        ([restored(5, "memory"), failed(10)], r"nothing that this process saved is"),
        ([saved(20), restored(5, "storage"), failed(10)], r"step 10 is not durable \(the newest that is: step 5"),
        ([saved(10, "memory"), failed(10)], "step 10 is not durable"),
    ],
)
def test_only_what_is_in_storage_counts(seen: list[Event], told: str) -> None:
    passed: list[Event] = []
    durability = Durability(passed.append)
    for event in seen:
        durability.on_event(event)
    assert passed == seen
    if told:
        with pytest.raises(NotDurable, match=told):
            durability.check()
    else:
        durability.check()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 700 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.root
def test_a_chained_job_does_not_go_on_after_a_full_disk(tmp_path: Path, small_disk: Path) -> None:
    config, run = tiny_config(tmp_path)
    words = ["--nproc-per-node", "2", "--checkpoint.url", str(small_disk / "checkpoints"), "--model.width", "96"]
    done = outlast("launch", config, *words, check=None)
    assert done.returncode == 1, done.stderr
    assert "step 20 is not durable (nothing that this process saved is)" in done.stderr
    assert len(events(run, "workers_started")) == 1  # the same would happen again
    assert not steps_saved(run)
    alone = tmp_path / "alone"
    words = ["--run.dir", str(alone), "--checkpoint.url", str(small_disk / "others"), "--model.width", "96"]
    assert outlast("train", config, *words, check=None).returncode == 1


@pytest.mark.root
def test_with_room_again_the_same_command_ends_well(tmp_path: Path, small_disk: Path) -> None:
    config, _ = tiny_config(tmp_path)
    words = ["--checkpoint.url", str(small_disk / "checkpoints"), "--trainer.steps", "5"]
    assert outlast("train", config, *words, check=None).returncode == 1
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    outlast("train", config, *words, "--run.resume", "auto")
    outlast("train", config, *words[:2], "--run.resume", "auto", "--checkpoint.every-steps", "3")


@pytest.mark.root
def test_a_notice_on_a_full_disk_is_a_failure(tmp_path: Path, small_disk: Path) -> None:
    """Work that was to be saved and is not: the status says so, on every rank, and nobody is told to just go on."""
    config, run = tiny_config(tmp_path)
    words = [
        "--checkpoint.url",
        str(small_disk / "checkpoints"),
        "--model.width",
        "96",
        "--checkpoint.every-steps",
        "5000",
    ]
    log = tmp_path / "log"
    job = start_outlast("launch", config, "--nproc-per-node", "2", *words, "--trainer.steps", "9000", log=log)
    wait_for(lambda: len(events(run, "step")) > 6)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=90) == 1
    said = log.read_text()
    assert "the run was ended by a notice (SIGTERM), but step" in said
    assert "is not durable (nothing that this process saved is)" in said
    assert "No space left on device" in said
    (failed,) = events(run, "workers_failed")
    assert failed["ranks"]  # whichever ended first; the other one may still be ending
    assert set(failed["ranks"]) <= {0, 1}
