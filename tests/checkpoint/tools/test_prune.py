"""Removing old steps by hand: what goes, what never goes; as a library and as ``outlast ckpt prune``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from outlast.checkpoint.tools import list_steps, prune, verify
from outlast.cli.main import main
from outlast.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint, OutOfRange
from tests.checkpoint.damage import files_of, flip, steps_at
from tests.checkpoint.helpers import checkpointer, save_by_ranks, save_steps

NAMES = {step: f"step_{step:08d}" for step in range(10)}


def damage(url: Path, step: int) -> None:
    """Spoil one file of a step that its votes list, whichever; the commit record stays good."""
    folder = url / NAMES[step]
    flip(next(path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent != folder))
    assert not verify(url, step).ok


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_newest_stay(tmp_path: Path) -> None:
    save_by_ranks(tmp_path, 1, 2, 3, 4, world_size=2)
    before, sizes = files_of(tmp_path), {step: size_of(tmp_path / NAMES[step]) for step in (1, 2)}
    would = prune(tmp_path, 2, dry_run=True)
    assert files_of(tmp_path) == before
    done = prune(tmp_path, 2)
    assert (would.dry_run, done.dry_run) == (True, False)
    assert would.removed == done.removed
    assert [(item.step, item.kind, item.size_bytes) for item in done.removed] == [
        (1, "committed", sizes[1]),
        (2, "committed", sizes[2]),
    ]
    assert (done.kept, done.damaged, done.size_bytes) == ((3, 4), (), sizes[1] + sizes[2])
    assert steps_at(tmp_path) == [NAMES[3], NAMES[4]]
    assert prune(tmp_path, 2).removed == ()
    assert prune(tmp_path, 7).kept == (3, 4)


def test_the_newest_that_verifies_stays_whatever_the_number(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, 4, 5)
    damage(tmp_path, 5)
    damage(tmp_path, 4)
    done = prune(tmp_path, 1)
    assert done.kept == (3, 4, 5)
    assert [bad.step for bad in done.damaged] == [5, 4]
    assert steps_at(tmp_path) == [NAMES[3], NAMES[4], NAMES[5]]
    with checkpointer(tmp_path) as saver:
        restored = saver.restore("auto")
    assert restored is not None
    assert restored.step == 3


def test_nothing_goes_if_none_verifies(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    damage(tmp_path, 1)
    damage(tmp_path, 2)
    before = files_of(tmp_path)
    with pytest.raises(CorruptCheckpoint, match="none of the committed steps"):
        prune(tmp_path, 1)
    assert files_of(tmp_path) == before


def test_unreadable_records_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, 4)
    flip(tmp_path / NAMES[2] / "commit.json")
    flip(tmp_path / NAMES[4] / "commit.json")
    assert prune(tmp_path, 1).kept == (3,)
    assert steps_at(tmp_path) == [NAMES[2], NAMES[3], NAMES[4]]


def test_aside_and_cut_off(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3)
    (tmp_path / NAMES[1]).rename(tmp_path / f"{NAMES[1]}.aside-1")
    (tmp_path / NAMES[4] / "model").mkdir(parents=True)
    (tmp_path / NAMES[4] / "model" / "zarr.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("not ours")
    assert prune(tmp_path, 5).removed == ()
    done = prune(tmp_path, 5, aside=True)
    assert [(item.folder, item.kind) for item in done.removed] == [
        (f"{NAMES[1]}.aside-1", "aside"),
        (NAMES[4], "cut off"),
    ]
    assert done.removed[1].size_bytes == 2
    assert steps_at(tmp_path) == ["notes.txt", NAMES[2], NAMES[3]]


def test_what_was_set_aside_stays_where_nothing_else_is_good(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    (tmp_path / NAMES[1]).rename(tmp_path / f"{NAMES[1]}.aside-1")
    damage(tmp_path, 2)
    with pytest.raises(CorruptCheckpoint):
        prune(tmp_path, 1, aside=True)
    shutil.rmtree(tmp_path / NAMES[2])
    with pytest.raises(CheckpointNotFound, match="no committed steps"):
        prune(tmp_path, 1, aside=True)
    assert steps_at(tmp_path) == [f"{NAMES[1]}.aside-1"]


def test_on_an_object_store() -> None:
    url = "memory://prune-tool"
    save_steps(url, 1, 2, 3)
    assert [item.step for item in prune(url, 1).removed] == [1, 2]
    assert [info.step for info in list_steps(url)] == [3]


def archived(url: Path, archive: Path, *steps: int) -> dict[str, bytes]:
    """Move steps to another disk, with links in their place; what is there then."""
    archive.mkdir()
    for step in steps:
        (url / NAMES[step]).rename(archive / NAMES[step])
        (url / NAMES[step]).symlink_to(archive / NAMES[step])
    return contents(archive)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_step_in_an_archive_loses_its_link_alone(tmp_path: Path) -> None:
    url, archive = tmp_path / "run", tmp_path / "archive"
    save_steps(url, 1, 2, 3)
    before = archived(url, archive, 1, 2)
    assert [item.step for item in prune(url, 1).removed] == [1, 2]
    assert steps_at(url) == [NAMES[3]]
    assert contents(archive) == before


def test_a_save_that_removes_old_steps_leaves_an_archive_alone(tmp_path: Path) -> None:
    url, archive = tmp_path / "run", tmp_path / "archive"
    save_steps(url, 1, 2)
    before = archived(url, archive, 1)
    save_steps(url, 3, attempt_id="two", old_steps="keep", keep_last=2)
    assert steps_at(url) == [NAMES[2], NAMES[3]]
    assert contents(archive) == before


def test_a_cut_off_save_in_an_archive_loses_its_link_alone(tmp_path: Path) -> None:
    url, archive = tmp_path / "run", tmp_path / "archive"
    save_steps(url, 1, 2)
    (url / NAMES[1] / "commit.json").unlink()
    (url / NAMES[1] / "votes" / "rank_00000.json").unlink()
    before = archived(url, archive, 1)
    with checkpointer(url, attempt_id="two") as again:
        assert again.restore("auto") is not None
        again.wait_copied()  # the run goes on: it clears away what was cut off
    assert not (url / NAMES[1]).is_symlink()
    assert contents(archive) == before


def test_bad_calls(tmp_path: Path) -> None:
    with pytest.raises(OutOfRange, match="keep-last = 0"):
        prune(tmp_path, 0)
    with pytest.raises(CheckpointNotFound):
        prune(tmp_path / "none", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be read"):
        prune(tmp_path / "file", 1)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(tmp_path, 1, 2, 3)
    words = ["ckpt", "prune", str(tmp_path), "--keep-last", "1"]
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"would be removed: {NAMES[1]} (committed)" in said
    assert "committed steps that would be left: 3" in said
    damage(tmp_path, 3)
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "step 3 is DAMAGED" in said
    assert f"removed: {NAMES[1]}" in said
    assert "committed steps left: 2, 3" in said
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["size_bytes"], told["removed"], told["kept"]) == (0, [], [2, 3])
    assert main(["ckpt", "prune", str(tmp_path), "--keep-last", "0"]) == 2
