"""What cannot be exported or imported, and what must not be overwritten: an error, and nothing half done."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from outlast.checkpoint.convert import export_step, import_step
from outlast.checkpoint.tools import list_steps
from outlast.errors import (
    CheckpointError,
    ConfigError,
    CorruptCheckpoint,
    MissingDependency,
)
from tests.checkpoint.converting import FORMATS, ODD, leftovers, needs_safetensors, restored, save
from tests.checkpoint.damage import files_of, flip, steps_at
from tests.checkpoint.states import same


@contextmanager
def small_disk(limit_bytes: int) -> Iterator[None]:
    """No file can grow beyond a size, as if the disk were full (Python ignores SIGXFSZ; writes fail with EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.ones(1)], "holds a list"),
        ({"outlast": 1}, "reserved"),
        ({5: torch.ones(1)}, "at the top"),
        ({"s": torch.ones(2, 2).to_sparse()}, "only dense"),
    ],
    ids=["list", "reserved", "key", "sparse"],
)
def test_what_cannot_be_stored(tmp_path: Path, content: Any, said: str) -> None:
    torch.save(content, tmp_path / "x")
    with pytest.raises(CheckpointError, match=said):
        import_step(tmp_path / "x", tmp_path / "b", "torch")
    assert list_steps(tmp_path / "b") == []


def test_dcp_lists_of_tensors_are_imported(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"l": [torch.ones(1), {"a": torch.zeros(2)}]}, checkpoint_id=tmp_path / "x", no_dist=True)
    import_step(tmp_path / "x", tmp_path / "b", "dcp")
    assert same(restored(tmp_path / "b")[1], {"l": [torch.ones(1), {"a": torch.zeros(2)}]})


def test_what_dcp_cannot_hold_is_told(tmp_path: Path) -> None:
    save(tmp_path / "a", {"w": torch.ones(1), "none": {}, "deep": {"none": {}, "l": [{}, 1, {}]}})
    assert set(export_step(tmp_path / "a", tmp_path / "x", "dcp").left_out) == {
        "none",
        "deep/none",
        "deep/l[0]",
        "deep/l[2]",
    }
    import_step(tmp_path / "x", tmp_path / "b", "dcp")
    assert same(restored(tmp_path / "b")[1], {"w": torch.ones(1), "deep": {"l": [{}, 1]}})
    save(tmp_path / "c", {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}})
    with pytest.raises(CheckpointError, match="/y "):
        export_step(tmp_path / "c", tmp_path / "y", "dcp")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "x"]


@needs_safetensors
def test_what_safetensors_cannot_hold(tmp_path: Path) -> None:
    for name, content in {
        "dtype": {"deep": {"c": torch.ones(1, dtype=torch.complex128)}},
        "twice": {"a/b": torch.ones(1), "a": {"b": torch.ones(1)}},
        "reserved": {"__metadata__": torch.ones(1)},
    }.items():
        save(tmp_path / name, content)
        with pytest.raises(CheckpointError, match=r"complex128|twice|reserved"):
            export_step(tmp_path / name, tmp_path / "x", "safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dtype", "reserved", "twice"]


def test_safetensors_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a", ODD)
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)  # what Python itself takes for "not to be found"
    with pytest.raises(MissingDependency, match=r"outlast\[safetensors\]"):
        export_step(tmp_path / "a", tmp_path / "x", "safetensors")
    with pytest.raises(MissingDependency, match=r"outlast\[safetensors\]"):
        import_step(tmp_path / "x", tmp_path / "b", "safetensors")
    assert steps_at(tmp_path) == ["a"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_target_is_replaced_only_by_force(tmp_path: Path, format: Any) -> None:
    save(tmp_path / "a", {"w": torch.ones(1)}, step=1)
    save(tmp_path / "a", {"w": torch.zeros(1)}, step=2)
    export_step(tmp_path / "a", tmp_path / "x", format, step=1)
    before = {path: path.read_bytes() for path in [tmp_path / "x", *(tmp_path / "x").rglob("*")] if path.is_file()}
    with pytest.raises(CheckpointError, match="already exists"):
        export_step(tmp_path / "a", tmp_path / "x", format)
    assert all(path.read_bytes() == data for path, data in before.items())
    export_step(tmp_path / "a", tmp_path / "x", format, force=True)
    import_step(tmp_path / "x", tmp_path / "b", format)
    assert same(restored(tmp_path / "b")[1], {"w": torch.zeros(1)})
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary").write_text("mine")
    with pytest.raises(CheckpointError, match="--force does not replace that"):
        export_step(tmp_path / "a", tmp_path / "home", format, force=True)
    assert files_of(tmp_path / "home") == ["diary"]
    with pytest.raises(CheckpointError, match="does not exist"):
        export_step(tmp_path / "a", tmp_path / "nowhere" / "x", format)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("format", FORMATS)
def test_a_link_to_what_is_there_is_followed_if_forced(tmp_path: Path, format: Any) -> None:
    save(tmp_path / "a", {"w": torch.ones(1)})
    export_step(tmp_path / "a", tmp_path / "real", format)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(CheckpointError, match="already exists"):
        export_step(tmp_path / "a", tmp_path / "link", format)
    done = export_step(tmp_path / "a", tmp_path / "link", format, force=True)
    assert done.target == str(tmp_path / "real")
    assert (tmp_path / "link").is_symlink()
    assert steps_at(tmp_path) == ["a", "link", "real"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_link_to_nothing_is_refused_before_anything_is_read(tmp_path: Path, format: Any, force: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    (tmp_path / "self").symlink_to("self")
    for name in ("link", "self"):
        with pytest.raises(CheckpointError, match=r"is a symbolic link to .*, which does not exist"):
            export_step(tmp_path / "no checkpoint", tmp_path / name, format, force=force)
    assert files_of(tmp_path / "elsewhere") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "link", "self"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_no_file_is_not_replaced(tmp_path: Path, format: Any, force: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(CheckpointError, match="no regular file"):
            export_step(tmp_path / "no checkpoint", target, format, force=force)
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(CheckpointError, match="a mounted file system"):
        export_step(tmp_path / "no checkpoint", "/proc", format, force=force)


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_nothing(tmp_path: Path, format: Any) -> None:
    save(tmp_path / "a", {"w": torch.ones(200_000)})
    export_step(tmp_path / "a", tmp_path / "x", format)
    kept = {path: path.read_bytes() for path in [tmp_path / "x", *(tmp_path / "x").rglob("*")] if path.is_file()}
    with small_disk(100_000):
        for force in (False, True):
            with pytest.raises(CheckpointError, match="/x" if force else "/y"):
                export_step(tmp_path / "a", tmp_path / ("x" if force else "y"), format, force=force)
        with pytest.raises(CheckpointError, match=r"step 0 cannot be saved .*File too large"):
            import_step(tmp_path / "x", tmp_path / "b", format)
    assert {path: path.read_bytes() for path in kept} == kept
    assert list_steps(tmp_path / "b") == []
    assert steps_at(tmp_path) == ["a", "b", "x"]
    assert import_step(tmp_path / "x", tmp_path / "b", format).tensors == 1


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, format: Any) -> None:
    save(tmp_path / "a", {"w": torch.ones(2000)})
    flip(max((tmp_path / "a").rglob("*"), key=lambda path: path.is_file() * path.stat().st_size))
    with pytest.raises(CorruptCheckpoint):
        export_step(tmp_path / "a", tmp_path / "x", format)
    assert steps_at(tmp_path) == ["a"]


def test_a_step_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    save(tmp_path / "a", ODD)
    export_step(tmp_path / "a", tmp_path / "x", "torch")
    before = files_of(tmp_path)
    with pytest.raises(CheckpointError, match=r"step 4 already exists at"):
        import_step(tmp_path / "x", tmp_path / "a", "torch", step=4)
    assert files_of(tmp_path) == before
    import_step(tmp_path / "x", tmp_path / "a", "torch", step=2)
    (tmp_path / "a" / "step_00000005" / "model").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="incomplete saves of step 5"):
        import_step(tmp_path / "x", tmp_path / "a", "torch", step=3)
    assert steps_at(tmp_path / "a") == ["step_00000002", "step_00000004", "step_00000005"]
    with pytest.raises(CheckpointError, match="a step is an integer >= 0, got -1"):
        import_step(tmp_path / "x", tmp_path / "a", "torch", step=-1)
    with pytest.raises(ConfigError, match="unknown format 'onnx'"):
        import_step(tmp_path / "x", tmp_path / "a", "onnx")  # type: ignore[arg-type]
