"""What `outlast ckpt` stands on, the comparison of saved and running state, and the settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import outlast.checkpoint as room
from outlast.checkpoint import (
    CheckpointConfig,
    check_like,
)
from outlast.checkpoint.tools import TensorInfo, describe, list_steps, verify
from outlast.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint, OutOfRange, StateMismatch
from tests.checkpoint.damage import files_of, flip
from tests.checkpoint.helpers import checkpointer, save_by_ranks, save_steps


def test_describe(tmp_path: Path) -> None:
    save_by_ranks(tmp_path, 3, 4, world_size=2)
    told = describe(tmp_path)
    assert (told.step, told.world_size, told.epoch) == (4, 2, "one")
    assert told.url == str(tmp_path / "step_00000004")
    assert TensorInfo("model/blocks.0.attn.qkv.weight", None, (4, 6), "float32", 96) in told.tensors
    assert TensorInfo("model/blocks.0.norm.bias", None, (6,), "bfloat16", 12) in told.tensors
    assert TensorInfo("comm/w/e", 1, (), "int64", 8) in told.tensors
    assert told.values["data/position"] == [4, 12]
    assert describe(tmp_path, 3).values["scheduler/lr"] == 0.1 / 4
    flip(tmp_path / "step_00000004" / "rank_00001" / "zarr.json")
    with pytest.raises(CorruptCheckpoint, match=r"rank_00001/zarr\.json"):
        describe(tmp_path)
    with pytest.raises(CheckpointNotFound, match="committed steps: 3, 4"):
        describe(tmp_path, 5)


def test_verify_tells_all_problems_and_its_progress(tmp_path: Path) -> None:
    save_steps(tmp_path, 4)
    folder = tmp_path / "step_00000004"
    seen: list[tuple[int, int]] = []
    good = verify(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert good.ok
    assert seen[-1] == (good.size_bytes, good.size_bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    flip(folder / "model" / "zarr.json")
    (folder / "data" / "zarr.json").unlink()
    bad = verify(tmp_path, 4)
    assert not bad.ok
    assert [(problem.file, problem.kind) for problem in bad.problems] == [
        ("data/zarr.json", "IncompleteCheckpoint"),
        ("model/zarr.json", "CorruptCheckpoint"),
    ]
    assert bad.files == good.files


def test_looking_changes_nothing(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    flip(tmp_path / "step_00000002" / "commit.json")
    (tmp_path / "step_00000003" / "model").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("not ours")
    before = files_of(tmp_path)
    assert [(info.step, info.status) for info in list_steps(tmp_path)] == [
        (1, "committed"),
        (2, "damaged"),
        (3, "uncommitted"),
    ]
    assert not verify(tmp_path, 2).ok
    assert files_of(tmp_path) == before
    assert list_steps(tmp_path / "none") == []


def test_a_place_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be read"):
        list_steps(tmp_path / "file")


def test_check_like() -> None:
    saved = {"a.w": torch.ones(2, 3), "b": torch.ones(4), "old": torch.ones(1), "n": {"x": torch.ones(1)}, "step": 3}
    check_like(saved, {**saved, "step": 9, "more": "text"})
    running = {
        "a.w": torch.ones(2, 4),
        "b": torch.ones(4, dtype=torch.bfloat16),
        "new": torch.empty(7, device="meta"),
        "n": {"x": torch.ones(1)},
    }
    with pytest.raises(StateMismatch) as error:
        check_like(saved, running)
    said = str(error.value)
    assert "4 tensors" in said
    assert "a.w: (2, 3) torch.float32 in the checkpoint, (2, 4) torch.float32 in the running state" in said
    assert "b: (4,) torch.float32 in the checkpoint, (4,) torch.bfloat16" in said
    assert "new: in the running state, not in the checkpoint" in said
    assert "old: in the checkpoint, not in the running state" in said
    with pytest.raises(StateMismatch, match="and 15 more"):
        check_like({}, {str(n): torch.ones(1) for n in range(25)})


@pytest.mark.parametrize(
    ("key", "value"),
    [("every_steps", 0), ("keep_last", -1), ("commit_timeout_s", 0.0), ("io_threads", 0), ("io_threads", 65)],
)
def test_settings_out_of_range(key: str, value: float) -> None:
    with pytest.raises(OutOfRange, match=f"checkpoint.{key} = {value}"):
        CheckpointConfig(**{key: value})  # type: ignore[arg-type]


def test_ranks_and_epochs_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="rank 2 of 2"):
        checkpointer(tmp_path, rank=2, world_size=2)
    with pytest.raises(CheckpointError, match="attempt_id ''"):
        checkpointer(tmp_path, attempt_id="")
    with checkpointer(tmp_path, world_size=2) as saver, pytest.raises(CheckpointError, match="without a process group"):
        saver.restore("auto")


def test_exports_are_the_public_names() -> None:
    assert sorted(room.__all__) == room.__all__
    assert all(hasattr(room, name) for name in room.__all__)


def test_no_pickle_and_no_zarr_writer_is_loaded() -> None:
    code = "import sys, outlast.checkpoint; sys.exit('zarr' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    for path in Path(room.__file__).parent.rglob("*.py"):
        if path.name in ("safe_unpickle.py", "torch_save.py"):
            continue  # import and export; tests/test_layering.py looks at them
        text = path.read_text()
        assert not any(word in text for word in ("import pickle", "torch.save(", "torch.load(", "_object("))
