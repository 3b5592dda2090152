"""Links that another user has placed where outlast makes its folders: refused before anything is made through them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from outlast.checkpoint.tiers.slots import OWN, local_folder, memory_folder, memory_path
from outlast.errors import CheckpointError

NOBODY = 65534


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder like ``/dev/shm``, open to everybody."""
    folder = tmp_path / "shm"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


@pytest.mark.root
def test_another_users_link(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir(mode=0o700)
    path = memory_path("url", root)
    path.symlink_to(target)
    os.lchown(path, NOBODY, NOBODY)
    for make in (memory_folder, local_folder):
        with pytest.raises(CheckpointError, match=f"is refused: .*belongs to user {NOBODY}"):
            make("url", root)
    assert list(target.iterdir()) == []


@pytest.mark.root
def test_another_users_folder(root: Path) -> None:
    path = memory_path("url", root)
    path.mkdir(mode=0o700)
    os.chown(path, NOBODY, NOBODY)
    with pytest.raises(CheckpointError, match=f"belongs to user {NOBODY}"):
        memory_folder("url", root)
    assert list(path.iterdir()) == []


def test_a_link_inside_and_a_folder_open_to_others(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    path = memory_path("url", root)
    path.mkdir(mode=0o700)
    (path / OWN).symlink_to(target)
    with pytest.raises(CheckpointError, match="is refused"):
        memory_folder("url", root)
    assert list(target.iterdir()) == []
    (path / OWN).unlink()
    path.chmod(0o777)
    with pytest.raises(CheckpointError, match="mode 0777"):
        memory_folder("url", root)
    assert list(path.iterdir()) == []
    path.chmod(0o700)
    assert sorted(entry.name for entry in memory_folder("url", root).iterdir()) == ["own", "partner"]
