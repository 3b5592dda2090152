from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.diagnostics import (
    Recorder,
)
from outlast.diagnostics.live import (
    clear,
    read_ring,
    ring_path,
    shm_directory,
)
from outlast.diagnostics.live.recorder import HEADER_BYTES, LABEL_BYTES, OP_BYTES, RECORD_BYTES, VERSION
from outlast.errors import DiagnosticsError
from tests.diagnostics.conftest import Spawn

WRITER = """
import sys
from pathlib import Path
from outlast.diagnostics import Recorder
recorder = Recorder(Path(sys.argv[1]), rank=3, capacity=64)
n = 0
while True:
    recorder.step = n // 10
    token = recorder.enter("all_gather", n, f"bucket {n % 7}")
    if n == 500:
        print("ready", flush=True)
    recorder.complete(token)
    n += 1
"""


def test_what_was_entered_and_completed_is_read_back(shm: Path) -> None:
    recorder = Recorder(ring_path(shm, 5), rank=5, capacity=8)
    recorder.step = 7
    first = recorder.enter("all_reduce", 1024, "bucket 0")
    second = recorder.enter("all_gather", 2048, "bucket 1")
    recorder.complete(first)
    ring = read_ring(ring_path(shm, 5))
    assert (ring.rank, ring.capacity, ring.entered, ring.torn) == (5, 8, 2, ())
    one, two = ring.records
    assert (one.seq, one.op, one.label, one.nbytes, one.step) == (first, "all_reduce", "bucket 0", 1024, 7)
    assert one.completed_s is not None
    assert one.entered_s <= one.completed_s
    assert two.completed_s is None
    assert ring.pending == (two,)
    recorder.complete(second)
    assert read_ring(ring_path(shm, 5)).pending == ()
    recorder.close(unlink=True)
    with pytest.raises(DiagnosticsError, match="cannot be read"):
        read_ring(ring_path(shm, 5))


@settings(max_examples=40)
@given(
    capacity=st.integers(1, 9),
    calls=st.lists(
        st.tuples(st.sampled_from(["a", "broadcast", "é" * 30]), st.integers(0, 2**50), st.text()), max_size=40
    ),
    left_open=st.sets(st.integers(0, 39)),
)
def test_the_ring_keeps_the_newest_and_overwrites_the_oldest(
    tmp_path_factory: pytest.TempPathFactory,
    capacity: int,
    calls: list[tuple[str, int, str]],
    left_open: set[int],
) -> None:
    path = tmp_path_factory.mktemp("ring") / "ring"
    recorder = Recorder(path, rank=0, capacity=capacity)
    for step, (op, nbytes, label) in enumerate(calls):
        recorder.step = step
        token = recorder.enter(op, nbytes, label)
        assert token == step
        if step not in left_open:
            recorder.complete(token)
    ring = read_ring(path)
    recorder.close()
    newest = list(enumerate(calls))[-capacity:]
    assert ring.entered == len(calls)
    assert ring.torn == ()
    assert [record.seq for record in ring.records] == [seq for seq, _ in newest]
    for record, (seq, (op, nbytes, label)) in zip(ring.records, newest, strict=True):
        assert (record.step, record.nbytes) == (seq, nbytes)
        assert op.encode()[:OP_BYTES].startswith(record.op.encode())
        assert label.encode()[:LABEL_BYTES].startswith(record.label.encode())
        assert (record.completed_s is None) == (seq in left_open)


def test_completing_a_collective_that_was_overwritten_changes_nothing(shm: Path) -> None:
    recorder = Recorder(ring_path(shm, 0), rank=0, capacity=2)
    lost = recorder.enter("all_reduce", 1, "x")
    for _ in range(2):
        recorder.enter("all_reduce", 1, "y")
    recorder.complete(lost)
    assert len(read_ring(ring_path(shm, 0)).pending) == 2
    recorder.close()


def test_threads_share_one_recorder(shm: Path) -> None:
    recorder = Recorder(ring_path(shm, 0), rank=0, capacity=4096)

    def work(name: str) -> None:
        for n in range(500):
            recorder.complete(recorder.enter(name, n, name))

    threads = [threading.Thread(target=work, args=(f"op{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ring = read_ring(ring_path(shm, 0))
    recorder.close()
    assert [record.seq for record in ring.records] == list(range(2000))
    for i in range(4):
        assert [r.nbytes for r in ring.records if r.op == f"op{i}" == r.label] == list(range(500))


def test_a_ring_is_readable_while_its_writer_runs_is_stopped_and_after_it_was_killed(shm: Path, spawn: Spawn) -> None:
    path = ring_path(shm, 3)
    writer = spawn(WRITER, path)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"

    def check() -> int:
        ring = read_ring(path)
        assert (ring.rank, ring.pid) == (3, writer.pid)
        for record in ring.records:  # every record is one that the writer wrote, whole
            assert (record.op, record.nbytes) == ("all_gather", record.seq)
            assert (record.label, record.step) == (f"bucket {record.seq % 7}", record.seq // 10)
        return ring.entered

    counts = [check() for _ in range(20)]
    assert counts == sorted(counts)
    writer.send_signal(signal.SIGSTOP)
    stopped = [check() for _ in range(3)]
    assert len(read_ring(path).torn) <= 1
    writer.kill()
    writer.wait(timeout=30)
    assert check() == stopped[-1] >= 500
    assert len(read_ring(path).records) + len(read_ring(path).torn) == 64


def test_a_record_that_was_being_written_is_reported_torn(shm: Path) -> None:
    path = ring_path(shm, 0)
    recorder = Recorder(path, rank=0, capacity=4)
    for n in range(6):
        recorder.complete(recorder.enter("all_reduce", n, "x"))
    recorder.close()
    with path.open("r+b") as file:  # as a writer leaves it that dies inside enter(): opened for #6, not closed
        at = HEADER_BYTES + 2 * RECORD_BYTES
        file.seek(at)
        file.write((7).to_bytes(8, "little"))
        file.seek(at + RECORD_BYTES - 8)
        file.write((0).to_bytes(8, "little"))
    ring = read_ring(path)
    assert ring.torn == (6,)
    assert [record.seq for record in ring.records] == [3, 4, 5]


def test_a_new_recorder_replaces_the_ring_of_the_process_before(shm: Path) -> None:
    path = ring_path(shm, 0)
    old = Recorder(path, rank=0, capacity=4)
    old.enter("all_reduce", 1, "old")
    new = Recorder(path, rank=0, capacity=8)
    old.enter("all_reduce", 1, "old")
    ring = read_ring(path)
    assert (ring.capacity, ring.records) == (8, ())
    old.close()
    new.close()


def test_a_closed_recorder_refuses(shm: Path) -> None:
    recorder = Recorder(ring_path(shm, 0), rank=0)
    token = recorder.enter("all_reduce", 1, "x")
    recorder.close()
    recorder.close()
    with pytest.raises(DiagnosticsError, match="closed"):
        recorder.enter("all_reduce", 1, "x")
    with pytest.raises(DiagnosticsError, match="closed"):
        recorder.complete(token)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"x" * 4096, "is not a recorder ring"),
        (b"OUTLRING" + (VERSION + 1).to_bytes(8, "little") + bytes(4080), f"version {VERSION + 1}"),
        (b"OUTLRING" + VERSION.to_bytes(8, "little") + (9).to_bytes(8, "little") + bytes(400), "for a capacity of 9"),
        (
            b"OUTLRING" + VERSION.to_bytes(8, "little") + (9).to_bytes(8, "little") + bytes(401),
            "is not a recorder ring",
        ),
    ],
)
def test_a_file_that_is_not_a_ring_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "ring"
    path.write_bytes(content)
    with pytest.raises(DiagnosticsError, match=message):
        read_ring(path)


def test_full_shared_memory_is_an_error_not_a_bus_error(shm: Path) -> None:
    with pytest.raises(DiagnosticsError, match=r"cannot allocate.*\n.*ring_capacity"):
        Recorder(ring_path(shm, 0), rank=0, capacity=2**40)
    assert list(shm.iterdir()) == []


class TestSharedMemoryFolder:
    def test_it_is_ours_alone_and_depends_on_the_run_directory(self, tmp_path: Path) -> None:
        here, there = shm_directory(tmp_path / "a"), shm_directory(tmp_path / "b")
        assert here != there
        assert here == shm_directory(tmp_path / "x" / ".." / "a")
        assert here.stat().st_mode & 0o777 == 0o700
        clear(here)
        clear(there)
        clear(there)
        assert not here.exists()

    def test_a_link_is_refused(self, tmp_path: Path) -> None:
        folder = shm_directory(tmp_path)
        clear(folder)
        folder.symlink_to(tmp_path)
        try:
            with pytest.raises(DiagnosticsError, match="symbolic link"):
                shm_directory(tmp_path)
            with pytest.raises(DiagnosticsError, match="symbolic link"):
                clear(folder)
        finally:
            folder.unlink()

    def test_a_folder_open_to_others_is_refused(self, tmp_path: Path) -> None:
        folder = shm_directory(tmp_path)
        folder.chmod(0o755)
        with pytest.raises(DiagnosticsError, match=r"0755.*\n.*chmod 700"):
            shm_directory(tmp_path)
        folder.rmdir()

    @pytest.mark.root
    def test_a_folder_of_another_user_is_refused(self, tmp_path: Path) -> None:
        folder = shm_directory(tmp_path)
        os.chown(folder, 65534, 65534)
        with pytest.raises(DiagnosticsError, match="belongs to user 65534"):
            shm_directory(tmp_path)
        folder.rmdir()


@pytest.mark.parametrize("entered", [3, 8, 21])
def test_only_the_newest_are_read_where_only_they_are_asked_for(tmp_path: Path, entered: int) -> None:
    recorder = Recorder(tmp_path / "ring", rank=0, capacity=8)
    for number in range(entered):
        recorder.complete(recorder.enter("all_reduce", 4, f"{number}"))
    everything = read_ring(tmp_path / "ring")
    newest = read_ring(tmp_path / "ring", newest=4)
    recorder.close()
    assert newest.records == everything.records[-4:]
    assert newest.entered == entered
