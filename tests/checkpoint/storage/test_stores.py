"""Places to save to: directories, URLs, places that cannot be written, disks that fill up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import torch

from outlast.checkpoint.storage.base import Store
from outlast.checkpoint.storage.local import LocalStore
from outlast.checkpoint.storage.open import open_store
from outlast.checkpoint.tools import list_steps, verify
from outlast.errors import CheckpointError, ConfigError, CorruptCheckpoint, MissingDependency
from outlast.events import CheckpointSaved, Event
from tests.checkpoint.damage import files_of, steps_at
from tests.checkpoint.helpers import checkpointer, failed, of, rejected, save_by_ranks, save_steps
from tests.checkpoint.s3 import BUCKET
from tests.checkpoint.states import local, same, state


@pytest.fixture(params=["path", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "s3":
        server = request.getfixturevalue("s3_server")
        with server.used():
            yield f"s3://{BUCKET}/{tmp_path.name}"
    elif request.param == "memory":
        place = f"memory://{tmp_path.name}"
        yield place
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)
    else:
        yield ("file://" if request.param == "file" else "") + str(tmp_path / "deep" / "checkpoints")


def test_everything_works_at_any_url(url: str) -> None:
    save_by_ranks(url, 1, 2, world_size=2)
    save_steps(url, 3, 4, 5, attempt_id="two", keep_last=3)
    assert [info.step for info in list_steps(url)] == [3, 4, 5]
    assert verify(url, 5).ok
    store = open_store(url)
    path = "step_00000005/model/blocks.0.norm.bias/c.0"
    data = store.read(path)
    data[0] ^= 1
    store.put(path, [data.data])
    store.remove("step_00000004/commit.json")
    store.remove("step_00000004/votes/rank_00000.json")
    assert [problem.file for problem in verify(url, 5).problems] == ["model/blocks.0.norm.bias/c.0"]
    events: list[Event] = []
    with checkpointer(url, events, attempt_id="three") as runner:
        with pytest.raises(CorruptCheckpoint, match="norm"):
            runner.restore(5)
        back = runner.restore("auto")
        assert back is not None
        assert back.step == 3
        assert same(back.replicated, state(3))
        assert rejected(events) == [(5, "model/blocks.0.norm.bias/c.0")]  # 4 is older: as if it was being removed
        assert [info.status for info in list_steps(url)] == ["committed", "uncommitted", "committed"]
        runner.wait_copied()
        assert [(info.step, info.status) for info in list_steps(url)] == [(3, "committed"), (5, "aside")]
        runner.save(5, replicated=state(5), local=local(5))
        again = runner.restore("auto")
    assert again is not None
    assert same(again.replicated, state(5))


@pytest.mark.parametrize("url", ["path", "file", "memory", "s3"], indirect=True)
def test_stores_behave_alike(url: str) -> None:
    store: Store = open_store(url)
    store.prepare()
    assert store.names("") == []
    store.put("a/b/c.0", [b"12", memoryview(b"345")])
    store.put_atomic("a/zarr.json", b"{}")
    store.put_atomic("a/zarr.json", b"{1}")
    store.put("a/empty", [])
    store.put_new("a/commit.json", b"record")
    store.put_new("a/commit.json", b"record")  # of which only the answer may have been lost
    with pytest.raises(FileExistsError, match=r"a/commit\.json|another attempt"):
        store.put_new("a/commit.json", b"other")
    store.sync_dirs(["a/b/c.0", "a/zarr.json"])
    assert store.names("") == ["a"]
    assert store.names("a") == ["b", "commit.json", "empty", "zarr.json"]
    assert store.names("none") == []
    assert store.sizes("a") == {"b/c.0": 5, "zarr.json": 3, "empty": 0, "commit.json": 6}
    assert bytes(store.read("a/b/c.0")) == b"12345"
    assert bytes(store.read("a/empty")) == b""
    assert store.exists("a/zarr.json")
    assert not store.exists("a/none")
    assert not store.exists("a")
    with pytest.raises(FileNotFoundError):
        store.read("a/none")
    store.remove("a/empty")
    store.remove("a/empty")
    store.put("b/zarr.json", [b"{}"])
    with pytest.raises(OSError, match=r"a"):
        store.move_tree("a", "b")
    store.remove_tree("b")
    with pytest.raises(FileNotFoundError):
        store.move_tree("b", "c")
    store.move_tree("a", "a.aside-1")
    assert store.names("") == ["a.aside-1"]
    assert bytes(store.read("a.aside-1/b/c.0")) == b"12345"
    assert store.exists("a.aside-1/commit.json")
    store.remove_tree("a.aside-1")
    store.remove_tree("a.aside-1")
    assert store.names("") == []


def test_home_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert open_store("~/x").url == str(tmp_path / "x") == open_store("x").url == open_store(Path("x")).url


def test_s3_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(MissingDependency, match=r"outlast\[s3\]"):
        checkpointer("s3://bucket/run")


def test_an_unknown_kind_of_url() -> None:
    with pytest.raises(ConfigError, match="did you mean 'memory'"):
        checkpointer("memroy://x")


def test_a_place_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(CheckpointError, match="cannot be written") as error:
        checkpointer(tmp_path / "file" / "checkpoints")
    assert str(tmp_path / "file" / "checkpoints") in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpointer(tmp_path)


def test_a_place_that_goes_away_while_training_goes_on(tmp_path: Path) -> None:
    url, events = tmp_path / "checkpoints", list[Event]()
    with checkpointer(url, events) as saver:
        saver.save(1, replicated=state(1), local=local(1))
        saver.save(2, replicated={}, local={})
        saver.wait_copied()
        assert saver._saving is not None
        saver._saving.join()
        url.rename(tmp_path / "elsewhere")
        url.write_text("in the way")
        saver.save(3, replicated=state(3), local=local(3))
        saver.wait_copied()
        saver._saving.join()
        assert len(failed(events)) == 1
        assert "Not a directory" in failed(events)[0]
        url.unlink()
        (tmp_path / "elsewhere").rename(url)
        saver.save(4, replicated=state(4), local=local(4))
    assert [event.step for event in of(CheckpointSaved, events)] == [1, 2, 4]


def test_a_write_that_fails_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(old: str, new: str) -> None:
        raise OSError(5, "Input/output error")

    store = LocalStore(str(tmp_path))
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="Input/output"):
        store.put_atomic("commit.json", b"record")
    assert files_of(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "outlast-test", str(place)], check=True, timeout=30)
    yield place
    subprocess.run(["umount", str(place)], check=True, timeout=30)


@pytest.mark.root
def test_a_full_disk(small_disk: Path) -> None:
    url, events = small_disk / "checkpoints", list[Event]()
    big = {"model": {f"layer.{n}": torch.full((128, 128), float(n)) for n in range(20)}}  # 1.25 MiB
    with checkpointer(url, events) as saver:
        saver.save(1, replicated=big, local=local(1))
        saver.save(2, replicated=big, local=local(2))
        saver.save(3, replicated=big, local=local(3))
        saver.save(4, replicated=state(4), local=local(4))  # the failed ones left room for a small one
        saver.wait_copied()
    assert [event.step for event in of(CheckpointSaved, events)] == [1, 4]
    assert len(failed(events)) == 2
    assert all("No space left on device" in reason for reason in failed(events))
    assert steps_at(url) == ["step_00000001", "step_00000004"]
    with checkpointer(url, attempt_id="two") as reader:
        back = reader.restore(1)
    assert back is not None
    assert same(back.replicated, big)


@pytest.mark.root
def test_a_full_disk_does_not_hold_the_other_ranks(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
    events = save_by_ranks(small_disk, 1, 2, world_size=2, commit_timeout_s=600.0)
    for seen in events:
        assert [event.kind for event in seen] == ["checkpoint_failed"] * 2
    (small_disk / "ballast").unlink()
    save_by_ranks(small_disk, 3, world_size=2, attempt_id="two")
    assert verify(small_disk).ok
    assert [path.name for path in small_disk.iterdir()] == ["step_00000003"]


def test_of_several_that_create_a_file_whole_one_succeeds(url: str) -> None:
    """Readers see all of what that one wrote, or nothing."""
    store = open_store(url)
    store.prepare()
    texts = [f"{number} ".encode() * 5000 for number in range(8)]

    def create(text: bytes) -> bool:
        try:
            store.create_whole("control/00000001.json", text)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(len(texts)) as pool:
        created = list(pool.map(create, texts))
    assert sum(created) == 1
    mine = texts[created.index(True)]
    assert bytes(store.read("control/00000001.json")) == mine
    assert create(mine), "its answer was lost, and it is written again"
    assert store.names("control") == ["00000001.json"]
