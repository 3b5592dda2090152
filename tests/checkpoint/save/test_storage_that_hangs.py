"""A storage that does not answer: the save is given up in bounded time and told, training goes on, and so do saves once
it answers again."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.checkpoint import Checkpointer
from outlast.checkpoint.format.names import LOCAL_DISK, MEMORY, STORAGE
from outlast.checkpoint.storage.io_threads import IoThreads
from outlast.checkpoint.tools import list_steps, verify
from outlast.errors import CheckpointError
from outlast.events import CheckpointFailed, CheckpointSaved, Event
from tests.checkpoint.faulty import Place
from tests.checkpoint.helpers import checkpointer, of, save_steps
from tests.checkpoint.states import local, state
from tests.helpers import wait_for

LIMIT_S = 1.5


class Disk:
    """A disk that can be frozen: whoever writes then waits in the kernel until it is thawed."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._frozen = False

    def freeze(self) -> None:
        self._do("--freeze")
        self._frozen = True

    def thaw(self) -> None:
        if self._frozen:
            self._do("--unfreeze")
            self._frozen = False

    def _do(self, what: str) -> None:
        subprocess.run(["fsfreeze", what, str(self.place)], check=True, timeout=30)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    image, place = tmp_path / "image", tmp_path / "disk"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, timeout=30)
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True, timeout=30)
    made = Disk(place)
    try:
        yield made
    finally:
        made.thaw()
        subprocess.run(["umount", "--lazy", str(place)], check=True, timeout=30)


def saved(events: list[Event], tier: str = STORAGE) -> list[int]:
    return [event.step for event in of(CheckpointSaved, events) if event.tier == tier]


def failed(events: list[Event], tier: str = STORAGE) -> dict[int, str]:
    return {event.step: event.reason for event in of(CheckpointFailed, events) if event.tier == tier}


def do_save(saver: Checkpointer, step: int) -> None:
    """Save, and go on as training does: the tensors change once the copy is waited for."""
    tensors = state(step)
    saver.save(step, replicated=tensors, local=local(step))
    saver.wait_copied()
    for tensor in tensors.values():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.zero_()


@pytest.mark.root
def test_training_goes_on_and_saves_again_when_it_answers(disk: Disk) -> None:
    url, events = disk.place / "run", list[Event]()
    with checkpointer(url, events, commit_timeout_s=LIMIT_S) as saver:
        do_save(saver, 1)
        saver._finish()
        disk.freeze()
        do_save(saver, 2)
        do_save(saver, 3)  # waits for the one before, within the limit
        do_save(saver, 4)  # does not wait again
        assert list(failed(events)) == [2, 3, 4]
        assert f"nothing was done for {LIMIT_S:g} s" in failed(events)[2]
        assert str(url) in failed(events)[2]
        for step in (3, 4):
            assert "the save of step 2 still hangs" in failed(events)[step]
        disk.thaw()
        hanging = saver._saving
        assert hanging is not None
        assert hanging.done.wait(60)
        do_save(saver, 5)
    assert saved(events) == [1, 5]
    assert list(failed(events)) == [2, 3, 4], "each is told once"
    assert [info.step for info in list_steps(url) if info.status == "committed"] == [1, 5]
    assert all(verify(url, step).ok for step in (1, 5))


@pytest.mark.root
def test_a_copy_that_needs_the_storage_s_pace_does_not_hold_training(disk: Disk) -> None:
    """Through less memory than the state takes, it is copied no faster than it is written."""
    url, events = disk.place / "run", list[Event]()
    limits = {"host_memory_mb": 0.5, "chunk_mb": 0.1, "commit_timeout_s": LIMIT_S}
    with checkpointer(url, events, **limits) as saver:
        model = {f"{n}": torch.ones(25_000) for n in range(40)}
        saver.save(1, replicated={"model": model})
        saver._finish()
        disk.freeze()
        saver.save(2, replicated={"model": model})
        assert saver.wait_copied() >= LIMIT_S / 2
        for tensor in model.values():
            tensor.zero_()  # an update: what the hanging thread still copies counts for nothing
        assert "nothing was done" in failed(events)[2]
        assert saver.wait_copied() < LIMIT_S / 2
        disk.thaw()
        assert saver._saving is not None
        assert saver._saving.done.wait(60)
        saver.save(3, replicated={"model": model})
    assert saved(events) == [1, 3]
    assert verify(url, 3).ok


@pytest.mark.root
@pytest.mark.parametrize("tier", [STORAGE, LOCAL_DISK])
def test_memory_goes_on_without_the_tier_that_hangs(tmp_path: Path, disk: Disk, tier: str) -> None:
    events = list[Event]()
    url, folder = (disk.place, tmp_path) if tier == STORAGE else (tmp_path, disk.place)
    settings = {"memory_every_steps": 1, "local_dir": str(folder / "local"), "local_every_steps": 1}
    (folder / "local").mkdir()
    saver = checkpointer(url / "run", events, commit_timeout_s=LIMIT_S, **settings)
    try:
        assert saver._tiers is not None
        do_save(saver, 1)
        saver._finish()
        for each in saver._tiers._fed:
            each.finish()
        disk.freeze()
        for step in (2, 3, 4):
            do_save(saver, step)
        saver._finish()
        fed = saver._tiers._fed
        assert list(failed(events, tier)) == [2, 3, 4]
        assert "nothing was done" in failed(events, tier)[2]
        assert saved(events, MEMORY) == [1, 2, 3, 4]
        other = ({STORAGE, LOCAL_DISK} - {tier}).pop()
        assert not failed(events, other)
        disk.thaw()
        wait_for(lambda: not any(each._newest is not None and each._newest.hangs for each in fed))
        do_save(saver, 5)
    finally:
        disk.thaw()
        saver.close()
    # A copy of one node's own that arrives late counts; the votes on a save that was given up do not.
    assert saved(events, tier) == ([1, 5] if tier == STORAGE else [1, 2, 5])
    assert list(failed(events, tier)) == [2, 3, 4]


ENDS = """
import sys, threading, torch
from outlast.checkpoint import Checkpointer
from tests.checkpoint.faulty import Place
from tests.checkpoint.helpers import checkpointer
place = Place("hangs")
c = checkpointer(place.url, commit_timeout_s=1.0)
c.save(1, replicated={"x": torch.ones(9)})
c._finish()
place.around = lambda name, path, do: threading.Event().wait() if "step_" in path else do()
c.save(2, replicated={"x": torch.ones(9)})
END
print("ends", flush=True)
"""


@pytest.mark.parametrize(
    "end", ["Checkpointer.close(c)", "c.abort()", pytest.param("c.wait_copied()", marks=pytest.mark.soak)]
)
def test_a_process_ends_though_its_storage_never_answers(end: str) -> None:
    """Closed, given up, or neither; the interpreter does not wait for threads that hang."""
    code = ENDS.replace("END", end)
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=120, cwd=Path(__file__).parents[3], capture_output=True, text=True
    )
    assert "checkpoint of step 2 failed" in done.stderr
    assert (done.returncode == 0) == (end == "c.abort()"), "what is asked for, and not durable, is a failure"
    assert ("NotDurable" in done.stderr) == (end == "Checkpointer.close(c)")
    assert ("ends" in done.stdout) == (end != "Checkpointer.close(c)")


def test_reading_from_a_storage_that_does_not_answer_is_an_error(request: pytest.FixtureRequest) -> None:
    place = Place(request.node.name)
    save_steps(place.url, 1)

    def hang(name: str, path: str, do: Callable[[], Any]) -> Any:
        if name == "cat_file" and not path.endswith(".json"):
            wait_for(lambda: bool(released), timeout_s=60)
        return do()

    released: list[bool] = []
    place.around = hang
    reader = checkpointer(place.url, commit_timeout_s=LIMIT_S, attempt_id="two")
    try:
        with pytest.raises(CheckpointError, match=f"has not answered for {LIMIT_S:g} s"):
            reader.restore("auto")
    finally:
        released.append(True)
        reader.close()


def test_a_pool_that_comes_forward_is_waited_for() -> None:
    """However long all of it takes: the limit is on the time without any answer."""
    pool = IoThreads(2, limit_s=0.4)

    def slow(number: int) -> int:
        time.sleep(0.1)
        return number

    assert list(pool.map(slow, range(16))) == list(range(16))
    with pytest.raises(ConnectionError, match=r"has not answered for 0\.4 s"):
        list(pool.map(lambda n: time.sleep(3), range(1)))
    pool.shutdown(wait=False)
    with pytest.raises(CheckpointError, match="have ended"):
        pool.submit(int)
