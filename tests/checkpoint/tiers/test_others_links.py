"""What another user has placed where outlast makes its folders: passed over, and nothing is made through it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from outlast.checkpoint.tiers.folders import OWN, SHM_ROOT, find_folder, local_folder, memory_folder, plain_name
from outlast.errors import CheckpointError
from tests.checkpoint.helpers import restored_by_one, tiers_taken
from tests.checkpoint.ranks import Orders, run

NOBODY = 65534


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder like ``/dev/shm``, open to everybody."""
    folder = tmp_path / "shm"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


@pytest.mark.root
def test_another_users_links_and_folders_are_passed_over(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir(mode=0o700)
    for end in ("", "-0", "-" + "f" * 16):
        path = root / f"{plain_name('url')}{end}"
        path.symlink_to(target) if end else path.mkdir(mode=0o700)
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    for make in (memory_folder, local_folder):
        folder = make("url", root)
        assert folder == find_folder("url", root) == make("url", root)
        assert folder.name not in {plain_name("url"), plain_name("url") + "-0"}
        assert folder.lstat().st_uid == os.getuid()
        assert folder.lstat().st_mode & 0o777 == 0o700
        shutil.rmtree(folder)
    assert list(target.iterdir()) == []
    assert list((root / plain_name("url")).iterdir()) == []


def test_a_link_inside_and_a_folder_open_to_others(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    path = memory_folder("url", root)
    (path / OWN).rmdir()
    (path / OWN).symlink_to(target)
    with pytest.raises(CheckpointError, match="is refused"):
        memory_folder("url", root)
    assert list(target.iterdir()) == []
    (path / OWN).unlink()
    path.chmod(0o777)
    with pytest.raises(CheckpointError, match="mode 0777"):
        memory_folder("url", root)
    path.chmod(0o700)
    assert sorted(entry.name for entry in memory_folder("url", root).iterdir()) == ["own", "partner"]


def test_names_cannot_be_guessed(root: Path) -> None:
    names = set()
    for _ in range(20):
        folder = memory_folder("url", root)
        names.add(folder.name)
        shutil.rmtree(folder)
    assert len(names) == 20


def test_the_folder_of_the_version_before_is_used(root: Path) -> None:
    old = root / plain_name("url")
    old.mkdir(mode=0o700)
    assert memory_folder("url", root) == local_folder("url", root) == old


def as_nobody(*words: str | Path, ok: bool = True) -> None:
    """Run a program as another user; it must succeed, or fail."""
    done = subprocess.run([*map(str, words)], user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True)
    assert (done.returncode == 0) is ok, done


@pytest.fixture
def taken(tmp_path: Path) -> Iterator[list[Path]]:
    """Names in ``/dev/shm`` that another user took before the run began: those that can be guessed."""
    begin = plain_name(str(tmp_path / "checkpoints"))
    paths = [SHM_ROOT / name for name in (begin, f"{begin}-", f"{begin}-0", f"{begin}-{'0' * 16}")]
    as_nobody("mkdir", "-m", "777", *paths[:2])
    as_nobody("ln", "-s", "/var/tmp", paths[2])
    as_nobody("ln", "-s", paths[3], paths[3])
    yield paths
    as_nobody("rm", "-rf", *paths)


@pytest.mark.root
def test_another_user_cannot_keep_a_run_from_its_memory(tmp_path: Path, taken: list[Path]) -> None:
    """A real second user; a run of two ranks that is killed, and goes on from its memory in a second start."""
    url = tmp_path / "checkpoints"
    settings = {"memory_every_steps": 1}
    orders = Orders((str(url),), "first", save=(1, 2), durable=(), settings=settings, die_after=((2, "memory"),))
    assert [one.exitcode for one in run(orders, orders)] == [-9] * 2
    folder = find_folder(str(url))
    assert folder is not None
    assert folder not in taken
    assert len(list((folder / OWN).glob("*.json"))) == 4, "both ranks use one folder"
    as_nobody("ls", folder, ok=False)
    as_nobody("touch", folder / "x", ok=False)
    as_nobody("mv", folder, folder.with_name("moved"), ok=False)
    as_nobody("mkdir", "-m", "700", folder.with_name(f"{folder.name}0"))  # made while the run is not there
    taken.append(folder.with_name(f"{folder.name}0"))
    again = Orders((str(url),), "second", restore=True, settings=settings)
    assert [one.restored for one in run(again, again)] == [[2], [2]]
    assert find_folder(str(url)) in (folder, None)
    for path in taken:
        assert path.lstat().st_uid == NOBODY
        if path.is_dir() and not path.is_symlink():
            assert list(path.iterdir()) == [], "nothing is made in it"
    if folder.exists():
        shutil.rmtree(folder)
    step, events = restored_by_one(url, settings)
    assert (step, tiers_taken(events) if step else set()) == (None, set())
