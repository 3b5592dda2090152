"""No room: on the disk of the run's directory, or in shared memory. Events are lost, counted and told; no step is."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from outlast.launch.lasting_output import LastingFile
from tests.checkpoint.helpers import small_disk
from tests.helpers import clean_env, events, outlast, start_outlast, wait_for
from tests.launch.jobs import STARTED
from tests.trainer.test_full_disk import filled

SCRIPT = Path(__file__).with_name("crowded_program.py")


def steps_of(folder: Path, rank: int) -> list[int]:
    path = folder / f"steps_of_rank_{rank}"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.mark.root
def test_a_full_disk_costs_a_program_that_prints_no_step(tmp_path: Path) -> None:
    disk, log = tmp_path / "disk", tmp_path / "log"
    run = disk / "run"
    with small_disk(disk, "1m"):
        words = ("--nproc-per-node", "2", "--max-restarts", "0", "--run-dir", run)
        job = start_outlast("launch", *words, SCRIPT, "60", tmp_path, "0.02", log=log)
        STARTED.append(job)
        wait_for(lambda: len(steps_of(tmp_path, 1)) > 5, every_s=0.05)
        with filled(disk):
            until = len(steps_of(tmp_path, 1)) + 15
            wait_for(lambda: len(steps_of(tmp_path, 1)) > until, every_s=0.05)
        assert job.wait(120) == 0, log.read_text()
        for rank in (0, 1):
            assert steps_of(tmp_path, rank) == list(range(1, 61))
        for rank in (0, 1):
            lost = [one["count"] for one in events(run, "events_lost") if one.rank == rank]
            kept = sum(one.rank == rank for one in events(run, "program_step"))
            assert lost
            assert kept < 59 <= kept + sum(lost), "a program's first step has no event"
        (printed,) = run.rglob("rank_00001.out")
        assert "bytes before this could not be written: the disk was full" in printed.read_text()
        assert printed.read_text().endswith("rank 1 is done\n")
        assert "of rank 1 were lost" in outlast("report", run).stdout


@pytest.mark.root
@pytest.mark.slow
def test_full_shared_memory_costs_the_watch_and_no_step(tmp_path: Path) -> None:
    """In a mount namespace, whose shared memory has room for nothing but names; a rank that was watched, and showed
    nothing for a few seconds, would be ended."""
    run = tmp_path / "run"
    words = ["outlast", "launch", "--nproc-per-node", "2", "--max-restarts", "0", "--run-dir", run]
    words += ["--launch.startup-limit-s", "2", "--launch.hang-floor-s", "1", "--launch.told-after-s", "1"]
    words += ["--launch.together-limit-s", "2", "--launch.alone-limit-s", "1", "--launch.patience", "1"]
    words += [SCRIPT, "40", tmp_path, "0.3"]
    script = 'mount -t tmpfs -o size=4k shm /dev/shm && dd if=/dev/zero of=/dev/shm/full bs=4096; exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-m", *map(str, words)]
    done = subprocess.run(command, env=clean_env(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert steps_of(tmp_path, rank) == list(range(1, 41))
    assert "rank 1 is not watched, and a hang of it is not found; training goes on" in done.stderr
    told = events(run, "rank_unwatched")
    assert sorted(one.rank for one in told) == [0, 1]
    assert all("No space left on device" in one["reason"] for one in told)
    assert not events(run, "hang_found")
    assert not events(run, "hang_suspected")
    assert len(events(run, "program_step")) == 78, "steps are events on the disk, and are all there"
    assert "not watched were ranks 0 of attempt 1, 1 of attempt 1" in outlast("report", run).stdout.replace("\n", " ")


@pytest.mark.root
def test_output_that_had_no_room_is_counted_in_the_file(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "64k"):
        raw = LastingFile(disk / "out", "w")
        with io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8") as file:
            print("before", file=file, flush=True)
            with filled(disk):
                for _ in range(100):
                    print("x" * 99, file=file, flush=True)
            assert raw.lost_bytes > 0
            print("after", file=file, flush=True)
            assert raw.lost_bytes == 0
        text = (disk / "out").read_text()
        kept = text.count("x")
        assert text.startswith("before\n")
        assert text.endswith("could not be written: the disk was full)\nafter\n")
        (lost,) = (int(line.split()[1]) for line in text.splitlines() if line.startswith("(outlast: "))
        assert kept + text[: text.index("(outlast")].count("\n") - 2 + lost == 100 * 100


def test_other_errors_are_raised_as_ever(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with LastingFile(write_end, "w") as file, pytest.raises(BrokenPipeError):
        file.write(b"x")
