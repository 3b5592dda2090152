"""What the tools say of a place where a run is saving: nothing is called damaged that is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from outlast.checkpoint.storage.local import LocalStore
from outlast.checkpoint.tools import list_steps, verify
from outlast.cli.main import main
from tests.checkpoint.damage import flip
from tests.checkpoint.helpers import before, checkpointer, save_steps
from tests.checkpoint.states import local, state


def cut_off(url: Path, step: int) -> None:
    """As a save looks that is not committed yet."""
    shutil.copytree(url / "step_00000001", url / f"step_{step:08d}")
    (url / f"step_{step:08d}" / "commit.json").unlink()


def test_a_save_in_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with checkpointer(tmp_path) as saver:
        saver.save(1, replicated=state(1), local=local(1))
        saver.wait_copied()
        while saver.running:
            pass
        cut_off(tmp_path, 2)
        found = verify(tmp_path, 2)
        assert found.problems == ()
        assert found.not_judged.startswith("being saved by ")
        assert not found.ok
        assert [info.status for info in list_steps(tmp_path)] == ["committed", "in progress"]
        assert main(["ckpt", "verify", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert "step 1: good" in said
        assert "step 2: being saved by " in said
        assert main(["ckpt", "verify", str(tmp_path), "--json"]) == 0
        assert [step["problems"] for step in json.loads(capsys.readouterr().out)] == [[], []]
        flip(next((tmp_path / "step_00000001").rglob("c.*")))  # what is damaged is called so, whoever is there
        assert main(["ckpt", "verify", str(tmp_path)]) == 1
    assert verify(tmp_path, 2).problems  # nobody is saving it now
    assert list_steps(tmp_path)[1].status == "uncommitted"


def test_a_step_that_is_pruned_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1, 2)
    gone = tmp_path / "step_00000001"
    before(monkeypatch, LocalStore, "read", lambda path: "step_00000001/model" in path, lambda: shutil.rmtree(gone))
    found = verify(tmp_path, 1)
    assert (found.problems, found.not_judged) == ((), "removed while it was read")
