"""The name of a run's shared memory: the same for all its processes, and nothing that another user can take first."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
from pathlib import Path

import pytest

from outlast.diagnostics.live import clear, shm_directory
from outlast.diagnostics.live.run_key import KEY_FILE, run_key
from outlast.diagnostics.live.shm import SHM_ROOT
from outlast.errors import DiagnosticsError

NOBODY = 65534


def test_whoever_asks_first_makes_it_and_all_get_the_same(tmp_path: Path) -> None:
    keys: list[str] = []
    start = threading.Barrier(8)

    def ask() -> None:
        start.wait(30)
        keys.append(run_key(tmp_path / "run"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(keys) == 8
    assert set(keys) == {run_key(tmp_path / "run")}
    assert [path.name for path in (tmp_path / "run").iterdir()] == [KEY_FILE]
    assert (tmp_path / "run" / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert run_key(tmp_path / "other") != keys[0]


def test_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("outlast.diagnostics.live.run_key.os.link", refused)
    assert run_key(tmp_path) == run_key(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / KEY_FILE
    for make in (
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.write_bytes(b"x" * 99),
        path.mkdir,
    ):
        make()
        with pytest.raises(DiagnosticsError, match=r"key of (the|a) run's shared memory"):
            run_key(tmp_path)
        path.rmdir() if path.is_dir() else path.unlink()


def as_nobody(*words: str | Path, ok: bool = True) -> None:
    done = subprocess.run([*map(str, words)], user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True)
    assert (done.returncode == 0) is ok, done


@pytest.mark.root
def test_another_user_cannot_keep_a_run_from_its_shared_memory(tmp_path: Path) -> None:
    """A real second user, who takes what could be guessed: the name without the key."""
    run = tmp_path / "run"
    digest = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    guessed = SHM_ROOT / f"outlast-{os.getuid()}-{digest}"
    as_nobody("mkdir", "-m", "777", guessed)
    try:
        folder = shm_directory(run)
        assert folder != guessed
        assert folder == shm_directory(run)
        as_nobody("touch", folder / "x", ok=False)
        as_nobody("cat", run / KEY_FILE, ok=False)
        assert list(guessed.iterdir()) == []
        clear(folder)
    finally:
        as_nobody("rmdir", guessed)
