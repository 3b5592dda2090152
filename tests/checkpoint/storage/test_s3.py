"""Checkpoints at s3://, by the real client on a real server: what it refuses, and what its death in between does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from obstore.fsspec import register

from outlast.checkpoint.storage import fsspec as fsspec_store
from outlast.checkpoint.storage import retry
from outlast.checkpoint.storage.fsspec import FsspecStore
from outlast.checkpoint.tools import list_steps, prune, verify
from outlast.errors import CheckpointError
from outlast.events import CheckpointSaved, Event
from tests.checkpoint.helpers import before, checkpointer, failed, of, rejected, save_and_join
from tests.checkpoint.s3 import BUCKET, Server
from tests.checkpoint.states import local, same, state

PACKED = {"pack_below_kb": 16.0}
"""A handful of objects a step."""


@pytest.fixture
def url(s3_server: Server, tmp_path: Path) -> Iterator[str]:
    with s3_server.used():
        yield f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def mortal() -> Iterator[Server]:
    """A server of the test's own."""
    server = Server()
    server.start()
    with server.used():
        yield server
    server.kill()


def gone(patch: pytest.MonkeyPatch, end: Callable[[], None]) -> Callable[[], None]:
    """End the server; what is tried from then on is given up soon. (Before, it may take its time on a busy machine.)"""

    def end_it() -> None:
        patch.setattr(retry, "FIRST_PAUSE_S", 0.02)
        patch.setattr(retry, "RETRY_FOR_S", 1.0)
        patch.setattr(fsspec_store, "ANSWER_S", 1.0)
        end()

    return end_it


def big(step: int) -> dict[str, Any]:
    """Several objects, none of them packed."""
    return {"model": {f"layer.{n}": torch.full((64, 128), float(step + n)) for n in range(6)}, "step": step}


def nth(count: int) -> Callable[[str], bool]:
    seen = []
    return lambda path: seen.append(path) or len(seen) == count  # type: ignore[func-returns-value]


def test_save_restore_save_anew_prune(url: str) -> None:
    events: list[Event] = []
    with checkpointer(url, events, keep_last=1, **PACKED) as saver:
        save_and_join(saver, 1, state(1))
        save_and_join(saver, 2, state(2))
    assert [info.step for info in list_steps(url)] == [2]
    with checkpointer(url, events, attempt_id="two", **PACKED) as saver:
        back = saver.restore("auto")
        assert back is not None
        assert same(back.replicated, state(2))
        assert same(back.local, local(2))
        save_and_join(saver, 2, state(20))
        again = saver.restore("auto")
    assert failed(events) == []
    assert again is not None
    assert again.step == 2
    assert same(again.replicated, state(20))
    assert verify(url).ok
    assert [(info.step, info.status) for info in list_steps(url)] == [(2, "committed"), (2, "aside")]
    assert [removal.kind for removal in prune(url, 1, aside=True).removed] == ["aside"]
    assert [info.folder for info in list_steps(url)] == ["step_00000002"]


def test_a_bucket_that_is_not_there(s3_server: Server) -> None:
    with s3_server.used():
        with checkpointer("s3://bukcet/run") as opened:  # which asks for nothing yet
            for act in (lambda: opened.restore("auto"), opened.claim):
                with pytest.raises(CheckpointError, match=r"s3://bukcet/run.*the bucket does not exist"):
                    act()
        with pytest.raises(CheckpointError, match="the bucket does not exist"):
            list_steps("s3://bukcet/run")


@pytest.mark.timeout(90)
def test_a_server_that_is_killed_in_a_save(mortal: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks give up well within the time they would wait for each other, and go on when there is a server."""
    url, seen = f"s3://{BUCKET}/run", (list[Event](), list[Event]())
    ranks = [checkpointer(url, seen[rank], rank=rank, world_size=2, commit_timeout_s=600.0) for rank in (0, 1)]

    def save_all(step: int) -> None:
        for rank, saver in enumerate(ranks):
            saver.save(step, replicated=big(step), local=local(step, rank))
        for saver in ranks:
            saver.wait_copied()
        for saver in ranks:
            assert saver._saving is not None
            saver._saving.join()

    save_all(1)
    assert verify(url, 1).ok
    with monkeypatch.context() as patch:
        before(patch, FsspecStore, "put_block", nth(4), gone(patch, mortal.kill))
        save_all(2)
        save_all(3)
    for events in seen:
        reason, _ = failed(events)
        assert reason.startswith(f"ConnectionError: {url}/step_00000002")
        assert "given up after" in reason
    mortal.start()
    save_all(4)
    for saver in ranks:
        saver.close()
    for rank, events in enumerate(seen):
        assert [event.step for event in of(CheckpointSaved, events)] == [1, 4]
        assert len(failed(events)) == 2, rank
    assert verify(url, 4).ok
    assert [info.step for info in list_steps(url)] == [4]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_server_that_does_not_answer_for_a_while(mortal: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a save, then in a restore; it has lost nothing."""
    url, events = f"s3://{BUCKET}/run", list[Event]()
    with checkpointer(url, events, commit_timeout_s=600.0, **PACKED) as saver:
        save_and_join(saver, 1, big(1))
        with monkeypatch.context() as patch:
            before(patch, FsspecStore, "put_new", lambda path: "/votes/" in path, gone(patch, mortal.freeze))
            save_and_join(saver, 2, big(2))
        mortal.thaw()
        (reason,) = failed(events)
        assert f"{url}/step_00000002/votes/rank_00000.json: given up after" in reason
        save_and_join(saver, 3, big(3))
    with checkpointer(url, events, attempt_id="two", **PACKED) as reader:
        with monkeypatch.context() as patch:
            before(patch, FsspecStore, "read", lambda path: path.endswith("/c.0.0"), gone(patch, mortal.freeze))
            with pytest.raises(CheckpointError, match=r"step_00000003.*ConnectionError.*given up after"):
                reader.restore("auto")
            with pytest.raises(CheckpointError, match=r"cannot be read: .*given up after"):
                verify(url)
        mortal.thaw()
        # Nothing was taken for damaged meanwhile.
        back = reader.restore("auto")
    assert back is not None
    assert back.step == 3
    assert same(back.replicated, big(3))
    assert [step for step, _ in rejected(events)] in ([], [2])
    assert [event.step for event in of(CheckpointSaved, events)] == [1, 3]


def test_a_server_that_dies_in_a_restore(mortal: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url, events = f"s3://{BUCKET}/run", list[Event]()
    with checkpointer(url, events, **PACKED) as saver:
        save_and_join(saver, 1, big(1))
        save_and_join(saver, 2, big(2))
        before(monkeypatch, FsspecStore, "read", lambda path: path.endswith("/c.0.0"), gone(monkeypatch, mortal.kill))
        with pytest.raises(CheckpointError, match=r"step_00000002.*ConnectionError.*given up after"):
            saver.restore("auto")
    assert rejected(events) == []


@pytest.fixture
def by_obstore(s3_server: Server, tmp_path: Path) -> Iterator[str]:
    """The same server by another client, registered in place of fsspec's own."""
    own = fsspec.get_filesystem_class("s3")
    with s3_server.used(), pytest.MonkeyPatch.context() as patch:
        patch.delitem(fsspec.config.conf, "s3")  # s3fs' settings
        register("s3")
        yield f"s3://{BUCKET}/{tmp_path.name}"
        fsspec.register_implementation("s3", own, clobber=True)


def test_obstore_does_as_well_and_says_what_it_cannot(by_obstore: str, caplog: pytest.LogCaptureFixture) -> None:
    for attempt_id, steps in (("one", (1, 2)), ("two", (2, 3))):
        with checkpointer(by_obstore, attempt_id=attempt_id, keep_last=2, **PACKED) as saver:
            for step in steps:
                saver.save(step, replicated=state(step), local=local(step))
    assert "cannot create a file exclusively" in caplog.text
    with checkpointer(by_obstore) as reader:
        back = reader.restore("auto")
    assert back is not None
    assert same(back.replicated, state(3))
    assert [step.step for step in list_steps(by_obstore) if step.status == "committed"] == [2, 3]
    assert verify(by_obstore, 2).ok
