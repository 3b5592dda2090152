"""Reading beside a run, or after it: the right step comes back, and nothing at the URL is changed."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import torch.distributed as dist

from outlast.checkpoint import load
from outlast.checkpoint.storage.local import LocalStore
from outlast.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint, StateMismatch
from tests.checkpoint.damage import flip
from tests.checkpoint.helpers import before, checkpointer, save_by_ranks, save_steps
from tests.checkpoint.sharded import checkpointer as ranks_checkpointer
from tests.checkpoint.sharded import run
from tests.checkpoint.sharded_training import Job, Sharding, whole
from tests.checkpoint.states import local, same, state
from tests.forked import context


def tree(url: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below a folder: by name the inode, size and time of change."""
    found = {}
    for path in sorted([url, *url.rglob("*")]):
        info = path.lstat()
        found[str(path)] = (info.st_ino, info.st_size, info.st_mtime_ns)
    return found


def right(step: int, found: Any, rank: int = 0) -> bool:
    return found.step == step and same(found.replicated, state(step)) and same(found.local, local(step, rank))


def test_the_newest_and_any_other(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3)
    assert right(3, load(tmp_path))
    assert right(2, load(str(tmp_path), 2))
    assert right(2, load(tmp_path, np.int64(2)))
    for wrong in (True, "2", 2.0, -1):
        with pytest.raises(CheckpointError, match="load: a step is an integer >= 0, got"):
            load(tmp_path, wrong)  # type: ignore[arg-type]


def test_saved_by_other_ranks(tmp_path: Path) -> None:
    save_by_ranks(tmp_path, 4, world_size=3)
    back = load(tmp_path)
    assert same(back.replicated, state(4))
    assert (back.local, back.world_size) == ({}, 3)
    assert same(back.read_local(2), local(4, 2))
    with pytest.raises(CheckpointError, match="saved by 3 ranks"):
        back.read_local(3)


def leftovers(url: Path) -> None:
    """What a restore of a run that goes on would put in order: a cut-off save, a damaged step, an overwritten one."""
    save_steps(url, 1, 2, 3, 4)
    shutil.copytree(url / "step_00000004", url / "step_00000009")
    (url / "step_00000009" / "commit.json").unlink()
    shutil.copytree(url / "step_00000001", url / "step_00000001.replaced")
    flip(next((url / "step_00000004").rglob("c.*")))


def test_nothing_is_changed(tmp_path: Path) -> None:
    leftovers(tmp_path)
    found = tree(tmp_path)
    assert right(3, load(tmp_path))
    assert right(1, load(tmp_path, 1))
    for step, error in ((4, CorruptCheckpoint), (9, CheckpointNotFound), (7, CheckpointNotFound)):
        with pytest.raises(error):
            load(tmp_path, step)
    assert tree(tmp_path) == found


def test_a_step_whose_overwrite_was_interrupted(tmp_path: Path) -> None:
    """Its older commit is what a run would go on from, once it has put that back; a reader leaves it where it is."""
    save_steps(tmp_path, 1, 2)
    (tmp_path / "step_00000002").rename(tmp_path / "step_00000002.replaced")
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000002")
    (tmp_path / "step_00000002" / "commit.json").unlink()
    found = tree(tmp_path)
    assert right(2, load(tmp_path))
    assert right(2, load(tmp_path, 2))
    assert same(load(tmp_path, 2).read_local(0), local(2))
    assert tree(tmp_path) == found


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leftovers(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a reader writes")

    for change in ("prepare", "put", "put_block", "put_atomic", "put_new", "remove", "remove_tree", "move_tree"):
        monkeypatch.setattr(LocalStore, change, refuse)
    assert right(3, load(tmp_path))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("runs/mine/checkpoint", "there is no such folder(.|\n)*did you mean 'checkpoints'"),
        ("run/mine/checkpoints", "there is no such folder(.|\n)*has no 'run'; did you mean 'runs'"),
        ("runs/mine", "this looks like a run's directory(.|\n)*pass .*/runs/mine/checkpoints"),
        ("runs/mine/checkpoints/step_00000002", "this is a step itself(.|\n)*/runs/mine/checkpoints and step=2"),
        ("other", "2 other files are there"),
        ("empty", "nothing is there"),
    ],
)
def test_a_mistyped_url(tmp_path: Path, wrong: str, said: str) -> None:
    save_steps(tmp_path / "runs/mine/checkpoints", 2)
    for name in ("other/a", "other/b", "empty"):
        (tmp_path / name).mkdir(parents=True)
    found = tree(tmp_path)
    with pytest.raises(CheckpointNotFound, match=said) as error:
        load(tmp_path / wrong)
    assert "looked for step_*/commit.json" in str(error.value)
    assert tree(tmp_path) == found


def test_a_step_that_is_not_there(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    with pytest.raises(CheckpointNotFound, match=r"looked for step_00000003/commit.json(.|\n)*committed steps: 1, 2"):
        load(tmp_path, 3)


def test_parts(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    for file in (tmp_path / "step_00000002").rglob("*"):
        if file.is_file() and "optimizer" in str(file):
            flip(file)
    back = load(tmp_path, parts=("model", "scheduler"))
    assert back.step == 2  # what is damaged is not read
    assert same(back.replicated, {key: state(2)[key] for key in ("model", "scheduler")})
    assert not back.as_saved
    assert back.local == {}
    assert same(load(tmp_path, 2, parts=["rng"]).local, {"rng": local(2)["rng"]})
    assert load(tmp_path).step == 1
    with pytest.raises(StateMismatch, match=r"no part 'modle'(.|\n)*its parts: comm, data, model, optimizer, rng"):
        load(tmp_path, parts=("modle",))
    with pytest.raises(CheckpointError, match=r"pass parts=\('model',\)"):
        load(tmp_path, parts="model")


def test_small_tensors_of_a_part_lie_among_others(tmp_path: Path) -> None:
    save_steps(tmp_path, 3, pack_below_kb=16)
    back = load(tmp_path, parts=("optimizer", "comm"))
    assert same(back.replicated, {"optimizer": state(3)["optimizer"]})
    assert same(back.local, {"comm": local(3)["comm"]})


def test_into_tensors_that_are_there(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    model = state(99)["model"]
    back = load(tmp_path, into={"model": model}, parts=("model",))
    assert same(model, state(3)["model"])
    assert back.replicated["model"]["blocks.0.norm.bias"] is model["blocks.0.norm.bias"]


def test_objects(tmp_path: Path) -> None:
    url = f"memory://load-{os.getpid()}"
    save_steps(url, 1, 2)
    filesystem = fsspec.filesystem("memory")
    found = filesystem.find(url)
    assert right(2, load(url))
    with pytest.raises(CheckpointNotFound, match="nothing is there"):
        load(f"{url}/elsewhere")
    assert filesystem.find(url) == found


def test_a_step_that_is_pruned_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1, 2)

    def go_on() -> None:
        save_steps(tmp_path, 3, attempt_id="live")
        shutil.rmtree(tmp_path / "step_00000002")

    before(monkeypatch, LocalStore, "read_into", lambda path: "step_00000002" in path, go_on)
    before(monkeypatch, LocalStore, "read", lambda path: "step_00000002/model" in path, go_on)
    assert right(3, load(tmp_path))


def test_a_chosen_step_that_is_pruned_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1, 2)
    gone = tmp_path / "step_00000001"
    before(monkeypatch, LocalStore, "read", lambda path: "step_00000001/model" in path, lambda: shutil.rmtree(gone))
    with pytest.raises(CheckpointNotFound, match=r"step 1(.|\n)*committed steps: 2"):
        load(tmp_path, 1)


def _live(url: str) -> None:
    with checkpointer(url, keep_last=2) as saver:
        for step in range(1, 100_000):
            saver.save(step, replicated=state(step), local=local(step))
            saver.wait_copied()


def test_beside_a_live_run(tmp_path: Path) -> None:
    live = context().Process(target=_live, args=(str(tmp_path),), daemon=True)
    live.start()
    try:
        deadline, steps = time.monotonic() + 60, list[int]()
        while len(steps) < 10 or steps[-1] == steps[0]:
            assert time.monotonic() < deadline
            try:
                back = load(tmp_path)
            except CheckpointNotFound:
                assert not steps
                continue
            assert right(back.step, back)
            steps.append(back.step)
        assert steps == sorted(steps)
        assert live.is_alive()
    finally:
        os.kill(live.pid or 0, signal.SIGKILL)
        live.join()


def _save(rank: int, url: str) -> Any:
    job = Job(rank, Sharding((dist.get_world_size(),)))
    with ranks_checkpointer(url, rank) as saver:
        for step in (1, 2):
            job.train(step)
            saver.save(step, replicated=job.state(), local={"rank": rank})
            saver.wait_copied()
    return whole(job.state()["model"])


def _evaluate(rank: int, url: str) -> Any:
    job = Job(rank, Sharding((dist.get_world_size(),)))
    model = job.model.state_dict()
    back = load(url, parts=("model",), into={"model": model})
    assert back.local == {}
    if rank == 1:  # what concerns one rank alone needs no other
        own = load(url, alone=True)
        assert [own.read_local(saved_by)["rank"] for saved_by in range(3)] == [0, 1, 2]
    said = ""
    try:
        load(url, parts=("model",) if rank else ("optimizer",), into={"model": model})
    except StateMismatch as error:
        said = str(error)
    return whole(job.model.state_dict()), back.step, said


def test_sharded_by_other_ranks(tmp_path: Path) -> None:
    saved = run(3, _save, str(tmp_path))[0]
    found = tree(tmp_path)
    for model, step, said in run(2, _evaluate, str(tmp_path)):
        assert step == 2
        assert all(np.array_equal(model[name], saved[name]) for name in saved)
        assert said.startswith("ranks [1] select by ['model']")
    assert tree(tmp_path) == found


def test_whole_without_ranks(tmp_path: Path) -> None:
    saved = run(3, _save, str(tmp_path))[0]
    back = load(tmp_path, parts=("model",), cast=torch.float64)
    for name, tensor in back.replicated["model"].items():
        assert tensor.dtype == torch.float64
        assert np.array_equal(tensor.float().numpy(), saved[name])
