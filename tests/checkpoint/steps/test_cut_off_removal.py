"""A process that is killed while it removes an old step leaves no checkpoint that a restart would call rejected."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from outlast.checkpoint.tools import list_steps
from outlast.events import CheckpointRejected
from tests.checkpoint.helpers import of, restored_by_one, save_steps
from tests.helpers import clean_env

KILLED_WHILE_REMOVING = """
import os, shutil, signal, sys
from tests.checkpoint.helpers import save_steps

removed = shutil.rmtree

def dies(path, *args, **more):
    if os.fspath(path).endswith(sys.argv[2]):
        os.unlink(next(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names))
        os.kill(os.getpid(), signal.SIGKILL)
    removed(path, *args, **more)

shutil.rmtree = dies
save_steps(sys.argv[1], 1, 2, 3, keep_last=2)
"""
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("at", ["step_00000001", "step_00000001/votes"])
def test_a_step_that_was_being_removed_is_not_rejected(tmp_path: Path, at: str) -> None:
    env = clean_env(PYTHONPATH=os.fspath(ROOT))
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_REMOVING, tmp_path, at], cwd=ROOT, env=env, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list_steps(tmp_path)[0].status == "uncommitted"
    step, events = restored_by_one(tmp_path, {"keep_last": 2})
    assert step == 3
    assert of(CheckpointRejected, events) == []
    assert [(info.step, info.status) for info in list_steps(tmp_path)] == [(2, "committed"), (3, "committed")]


def test_a_save_that_was_cut_off_is_told_as_one_that_lost_no_checkpoint(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    (tmp_path / "step_00000002" / "commit.json").unlink()
    (tmp_path / "step_00000002" / "votes" / "rank_00000.json").unlink()
    step, events = restored_by_one(tmp_path, {})
    assert step == 1
    (told,) = of(CheckpointRejected, events)
    assert (told.step, told.damaged) == (2, False)


def test_newer_steps_than_the_one_asked_for_are_not_damaged(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    _, events = restored_by_one(tmp_path, {}, which=1)
    (told,) = of(CheckpointRejected, events)
    assert (told.step, told.damaged) == (2, False)


def test_a_damaged_step_is(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    (tmp_path / "step_00000002" / "votes" / "rank_00000.json").write_bytes(b"{}")
    step, events = restored_by_one(tmp_path, {})
    assert step == 1
    assert [told.damaged for told in of(CheckpointRejected, events)] == [True]
