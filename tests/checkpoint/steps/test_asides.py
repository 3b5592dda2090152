"""Steps that were set aside do not pile up; and none goes before there is something newer."""

from __future__ import annotations

from pathlib import Path

import pytest

from outlast.checkpoint.config import CheckpointConfig
from outlast.checkpoint.steps.retention import prune_asides
from outlast.checkpoint.storage.local import LocalStore
from outlast.errors import ConfigError
from tests.checkpoint.damage import flip, steps_at
from tests.checkpoint.helpers import checkpointer, save_steps
from tests.checkpoint.states import local, state


def asides(url: Path) -> list[str]:
    return [name for name in steps_at(url) if ".aside-" in name]


def back_and_on(url: Path, back_to: int, *steps: int, keep: int) -> None:
    """A run that goes back to a step, and on from there."""
    with checkpointer(url, attempt_id=f"{back_to}-{steps}-{len(asides(url))}", aside_keep_last=keep) as one:
        assert one.restore(back_to) is not None
        for step in steps:
            one.wait_copied()
            one.save(step, replicated=state(step), local=local(step))


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_as_many_are_kept_as_is_said(tmp_path: Path, keep: int) -> None:
    save_steps(tmp_path, 1, 2, 3)
    for _ in range(4):  # each goes back to step 1, and saves 2 and 3 again
        back_and_on(tmp_path, 1, 2, 3, keep=keep)
    names = [f"step_{step:08d}.aside-{number}" for step in (2, 3) for number in (1, 2, 3, 4)]
    # Of step 3 none is older than what is committed.
    assert asides(tmp_path) == (names if not keep else names[4:])
    back_and_on(tmp_path, 3, 4, keep=keep)
    assert asides(tmp_path) == (names if not keep else names[-keep:])
    with checkpointer(tmp_path, attempt_id="last") as one:
        assert one.restore("auto").step == 4  # type: ignore[union-attr]


def test_none_goes_before_a_newer_step_is_committed(tmp_path: Path) -> None:
    """The newest three are damaged, and the run goes on from the first: what they had may still be wanted."""
    save_steps(tmp_path, 1, 7, 8, 9)
    for step in (7, 8, 9):
        flip(next((tmp_path / f"step_{step:08d}").rglob("c.0.0")))
    with checkpointer(tmp_path, attempt_id="second", aside_keep_last=1) as one:
        assert one.restore("auto").step == 1  # type: ignore[union-attr]
        for step in (2, 3):
            one.wait_copied()
            one.save(step, replicated=state(step), local=local(step))
    names = [f"step_{step:08d}.aside-1" for step in (7, 8, 9)]
    assert asides(tmp_path) == names
    back_and_on(tmp_path, 3, 8, keep=1)
    assert asides(tmp_path) == names[1:], "of 7 there is a newer step, and one is kept"


def test_other_names_and_links(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    (archive / "kept").write_text("kept")
    url = tmp_path / "url"
    for name in ("step_00000001.aside-2", "step_00000001.aside-10", "step_00000002.aside-x", "earlier-1", "aside"):
        (url / name).mkdir(parents=True)
    (url / "step_00000001.aside-1").symlink_to(archive)
    prune_asides(LocalStore(str(url)), 5, 1)
    assert sorted(path.name for path in url.iterdir()) == [
        "aside",
        "earlier-1",
        "step_00000001.aside-10",
        "step_00000002.aside-x",
    ]
    assert (archive / "kept").exists()
    with pytest.raises(ConfigError, match="aside_keep_last"):
        CheckpointConfig(aside_keep_last=-1)
