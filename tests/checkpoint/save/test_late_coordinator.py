"""A coordinator of an earlier attempt stalls, and continues while another attempt saves the same step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from outlast.checkpoint.storage.fsspec import FsspecStore
from outlast.checkpoint.storage.local import LocalStore
from outlast.checkpoint.tools import verify
from outlast.events import Event
from tests.checkpoint.helpers import before, checkpointer, failed, save_and_join
from tests.checkpoint.s3 import BUCKET
from tests.checkpoint.states import local, same, state

Place = tuple[str, type]


@pytest.fixture(params=["path", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A URL, and the class of its store."""
    if request.param == "path":
        yield str(tmp_path), LocalStore
        return
    with request.getfixturevalue("s3_server").used():
        yield f"s3://{BUCKET}/{tmp_path.name}", FsspecStore


def test_the_second_commit_of_a_step_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt's coordinator stalls right before it writes its commit record, and continues too late."""
    url, kind = place
    stands, go, events, late = threading.Event(), threading.Event(), list[Event](), list[Event]()

    def stand() -> None:
        stands.set()
        assert go.wait(60)

    before(monkeypatch, kind, "put_new", lambda path: path.endswith("/commit.json"), stand)
    first = checkpointer(url, late, attempt_id="one", pack_below_kb=16.0)
    first.save(7, replicated=state(1), local=local(1))
    first.wait_copied()
    assert stands.wait(60)
    with checkpointer(url, events, attempt_id="two", pack_below_kb=16.0) as second:
        save_and_join(second, 7, state(2))
        assert failed(events) == []
        go.set()
        first.close()
        (reason,) = failed(late)
        assert "FileExistsError" in reason
        assert "written by another attempt, or a late rank of one" in reason
        assert f"{url}/step_00000007/commit.json" in reason
        back = second.restore("auto")
    assert back is not None
    assert same(back.replicated, state(2))
    assert verify(url, 7).ok


def test_a_coordinator_whose_step_was_opened_anew_does_not_commit(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, kind = place
    stands, go, events, late = threading.Event(), threading.Event(), list[Event](), list[Event]()

    def stand() -> None:
        stands.set()
        assert go.wait(60)

    def let_the_first_go_on() -> None:
        go.set()
        first.close()

    before(monkeypatch, kind, "sync_dirs", lambda paths: paths == ["step_00000007/votes/rank_00000.json"], stand)
    first = checkpointer(url, late, attempt_id="one", pack_below_kb=16.0)
    first.save(7, replicated=state(1), local=local(1))
    first.wait_copied()
    assert stands.wait(60)
    before(monkeypatch, kind, "put_new", lambda path: path.endswith("/commit.json"), let_the_first_go_on)
    with checkpointer(url, events, attempt_id="two", pack_below_kb=16.0) as second:
        save_and_join(second, 7, state(2))
    assert failed(events) == []
    assert "was opened again meanwhile, by attempt two, save 1" in failed(late)[0]
    assert verify(url, 7).ok
