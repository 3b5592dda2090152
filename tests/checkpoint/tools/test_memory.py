"""What lies in a node's memory, looked at and given back; never while a run uses it."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpoint.tiers.folders import memory_path
from outlast.checkpoint.tiers.run_lock import RunLock, alone, is_used
from outlast.checkpoint.tools import list_memory, remove_memory
from outlast.cli.main import main
from outlast.errors import CheckpointError
from tests.checkpoint.damage import files_of
from tests.checkpoint.helpers import checkpointer
from tests.checkpoint.ranks import Orders, run
from tests.checkpoint.states import local, state

MEMORY = {"memory_every_steps": 1}


@pytest.fixture
def url(tmp_path: Path) -> Iterator[Path]:
    """A place for checkpoints, whose shared memory is removed afterwards."""
    place = tmp_path / "checkpoints"
    yield place
    shutil.rmtree(memory_path(str(place)), ignore_errors=True)


def killed(url: Path, *steps: int, ranks: int = 1) -> None:
    """A job that saves these steps to memory and is then killed."""
    orders = Orders((str(url),), "first", save=steps, durable=(), settings=MEMORY, die_after=((steps[-1], "memory"),))
    assert [one.exitcode for one in run(*[orders] * ranks)] == [-9] * ranks


def test_steps_are_listed_and_given_back(url: Path) -> None:
    assert list_memory(url).steps == remove_memory(url).steps == ()
    killed(url, 1, 2, 3, ranks=2)
    folder = memory_path(str(url))
    next(folder.rglob("*.3.commit")).unlink()
    before = files_of(folder)
    found = list_memory(url)
    assert files_of(folder) == before
    assert (found.url, found.folder, found.in_use) == (str(url), str(folder), False)
    assert [(one.step, one.serial, one.committed) for one in found.steps] == [(1, 1, True), (2, 2, True), (3, 3, False)]
    assert {(one.epoch, one.world_size, one.own_ranks, one.partner_ranks) for one in found.steps} == {
        ("first", 2, (0, 1), ())
    }
    assert 0 < sum(one.size_bytes for one in found.steps) < found.reserved_bytes
    assert remove_memory(url) == found
    assert not folder.exists()
    assert list_memory(url).steps == ()
    with checkpointer(url, [], attempt_id="second", **MEMORY) as one:
        assert one.restore("auto") is None


def test_not_while_a_run_uses_it(url: Path) -> None:
    with checkpointer(url, [], **MEMORY) as one:
        assert list_memory(url).in_use
        one.save(1, replicated=state(1), local=local(1), durable=False)
        one.wait_copied()
        with pytest.raises(CheckpointError, match=rf"is in use by a run( \(processes {os.getpid()}\))?\n"):
            remove_memory(url)
    found = list_memory(url)
    assert not found.in_use
    assert [one.step for one in found.steps] == [1]
    assert remove_memory(url) == found


def test_several_use_it_until_they_are_let_go_of(tmp_path: Path) -> None:
    assert not is_used(memory_path("somewhere", tmp_path))
    one, other = RunLock("somewhere", tmp_path), RunLock("somewhere", tmp_path)
    folder = memory_path("somewhere", tmp_path)
    assert one.folder == other.folder == folder
    one.close()
    one.close()
    assert is_used(folder)
    del other  # as that of a Checkpointer whose construction fails
    assert not is_used(folder)


def test_a_run_that_begins_meanwhile_waits(tmp_path: Path) -> None:
    RunLock("somewhere", tmp_path).close()
    folder = memory_path("somewhere", tmp_path)
    found: list[Any] = []
    begins = threading.Thread(target=lambda: found.append(RunLock("somewhere", tmp_path, folder.name)))
    with alone(folder):
        begins.start()
        begins.join(0.2)
        assert not found
        shutil.rmtree(folder)
    begins.join(30)
    assert found[0].folder == folder
    assert folder.is_dir()
    assert is_used(folder), "it is the new folder that is locked"
    found[0].close()
    assert not is_used(folder)


def test_what_is_not_ours_alone_is_left(url: Path) -> None:
    killed(url, 1)
    folder = memory_path(str(url))
    folder.chmod(0o755)
    for act in (list_memory, remove_memory):
        with pytest.raises(CheckpointError, match="mode 0755"):
            act(url)
    folder.chmod(0o700)
    assert len(list_memory(url).steps) == 1


@pytest.mark.root
def test_a_partners_copies(tmp_path: Path, nodes: list[str]) -> None:
    url = str(tmp_path / "checkpoints")
    settings = {"memory_every_steps": 1, "partner_every_steps": 1}
    after = ((1, "memory"), (1, "partner"))
    ranks = [
        Orders((url,), "first", save=(1,), durable=(), settings=settings, die_after=after, shm=nodes[rank // 2])
        for rank in range(4)
    ]
    assert [one.exitcode for one in run(*ranks)] == [-9] * 4
    for number, node in enumerate(nodes):
        (step,) = list_memory(url, Path(node)).steps
        assert (step.own_ranks, step.partner_ranks) == (((0, 1), (2, 3)), ((2, 3), (0, 1)))[number]
    remove_memory(url, Path(nodes[0]))
    assert not list_memory(url, Path(nodes[0])).steps
    assert list_memory(url, Path(nodes[1])).steps


def test_command(url: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ckpt", "memory", str(url)]) == 0
    assert capsys.readouterr().out == f"nothing in this node's memory for {url}\n"
    killed(url, 1, 2, ranks=3)
    assert main(["ckpt", "memory", str(url)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].split()[:6] == ["1", "first", "committed", "3", "0-2", "-"]
    folder = memory_path(str(url))
    assert said[3].startswith(str(folder))
    assert said[3].endswith("no run uses it; --remove frees it")
    assert main(["ckpt", "memory", str(url), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["removed"], told["in_use"], [one["step"] for one in told["steps"]]) == (False, False, [1, 2])
    with checkpointer(url, [], attempt_id="second", **MEMORY) as one:
        assert main(["ckpt", "memory", str(url)]) == 0
        assert "in use by a run" in capsys.readouterr().out
        assert main(["ckpt", "memory", str(url), "--remove"]) == 1
        assert "nothing was removed" in capsys.readouterr().err
        assert one.restore("auto", any_world_size=True) is not None
    assert main(["ckpt", "memory", str(url), "--remove"]) == 0
    assert f"removed: {folder}" in capsys.readouterr().out
    assert not folder.exists()
