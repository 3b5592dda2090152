"""Sources that are hostile or damaged: refused, not run, and no step is made of them."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from outlast.checkpoint.convert import export_step, import_step
from outlast.checkpoint.tools import list_steps
from outlast.errors import (
    CheckpointError,
    CheckpointNotFound,
    ConfigError,
    CorruptCheckpoint,
    OutlastError,
)
from tests.checkpoint.converting import FORMATS, save
from tests.checkpoint.damage import flip
from tests.checkpoint.states import same


class Hostile:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


def hostile_dcp(folder: Path, mark: Path) -> None:
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Hostile(mark)}))


def hostile_dcp_value(folder: Path, mark: Path) -> None:
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"x": Hostile(mark)}, checkpoint_id=folder, no_dist=True)


def hostile_torch(file: Path, mark: Path) -> None:
    torch.save({"x": torch.ones(1), "y": Hostile(mark)}, file)


def hostile_torch_legacy(file: Path, mark: Path) -> None:
    torch.save({"y": Hostile(mark)}, file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("make", "format"),
    [(hostile_dcp, "dcp"), (hostile_dcp_value, "dcp"), (hostile_torch, "torch"), (hostile_torch_legacy, "torch")],
)
def test_hostile_pickles_are_refused_and_not_run(
    tmp_path: Path, make: Callable[[Path, Path], None], format: Any
) -> None:
    make(tmp_path / "x", tmp_path / "mark")
    with pytest.raises(CheckpointError, match=r"posix\.mkdir"):
        import_step(tmp_path / "x", tmp_path / "b", format)
    assert not (tmp_path / "mark").exists()
    assert list_steps(tmp_path / "b") == []


@pytest.mark.parametrize("names", ["builtins eval", "torch load", "torch.distributed.checkpoint.metadata os"])
def test_metadata_may_name_nothing_else(tmp_path: Path, names: str) -> None:
    module, name = names.split()
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(CheckpointError, match=f"names {module}.{name}, which"):
        import_step(tmp_path, tmp_path / "b", "dcp")


def test_metadata_changes_no_class_of_the_process(tmp_path: Path) -> None:
    """BUILD with slots sets attributes of whatever it is given: of a class, were the class itself handed out."""
    kind = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + kind + b"N}X\x04\x00\x00\x00markK\x01s\x86b.")
    with pytest.raises(CorruptCheckpoint):
        import_step(tmp_path, tmp_path / "b", "dcp")
    from torch.distributed.checkpoint.metadata import MetadataIndex

    assert not hasattr(MetadataIndex, "mark")


def test_dcp_metadata_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

    torch.save(1, tmp_path / "secret")
    (tmp_path / "x").mkdir()
    for path in ("../secret", str(tmp_path / "secret")):
        places = {MetadataIndex("v"): _StorageInfo(path, 0, (tmp_path / "secret").stat().st_size)}
        found = Metadata({"v": BytesStorageMetadata()}, None, places)
        (tmp_path / "x" / ".metadata").write_bytes(pickle.dumps(found))
        with pytest.raises(CheckpointError, match="points outside of the folder"):
            import_step(tmp_path / "x", tmp_path / "b", "dcp")


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_sources(tmp_path: Path, format: Any) -> None:
    """A flipped bit in a tensor, a file cut short, an empty one: an error, and no step."""
    save(tmp_path / "a", {"w": torch.arange(20000.0)})
    export_step(tmp_path / "a", tmp_path / "x", format)
    file = max([tmp_path / "x", *(tmp_path / "x").rglob("*")], key=lambda path: path.is_file() * path.stat().st_size)
    whole = file.read_bytes()
    flip(file)
    broken = [file.read_bytes(), whole[:-100], whole[: len(whole) // 2], b"", b"no such format\n" * 3]
    for data in broken:
        file.write_bytes(data)
        with pytest.raises(CheckpointError):
            import_step(tmp_path / "x", tmp_path / "b", format)
        assert list_steps(tmp_path / "b") == []
    file.write_bytes(whole)
    assert import_step(tmp_path / "x", tmp_path / "b", format).tensors == 1


@pytest.mark.parametrize("format", FORMATS)
def test_random_damage_is_always_an_error_of_ours(tmp_path: Path, format: Any) -> None:
    """Any bit of a small source: imported as it was, or refused. PyTorch has no checksum of a DCP's metadata."""
    save(tmp_path / "a", {"w": torch.arange(4.0), "n": [1]})
    export_step(tmp_path / "a", tmp_path / "x", format)
    file = tmp_path / "x" / ".metadata" if format == "dcp" else tmp_path / "x"
    whole = file.read_bytes()
    module = "torch_save" if format == "torch" else format
    read = sys.modules[f"outlast.checkpoint.convert.{module}"].read
    generator = torch.Generator().manual_seed(1)
    for place in torch.randint(len(whole), (150,), generator=generator).tolist():
        data = bytearray(whole)
        data[place] ^= 1 << (place % 8)
        file.write_bytes(data)
        with suppress(OutlastError):
            got = read(str(tmp_path / "x"))
            assert format == "dcp" or same(got, {"w": torch.arange(4.0), "n": [1]})


@pytest.mark.parametrize("format", FORMATS)
def test_wrong_format_and_missing_sources(tmp_path: Path, format: Any) -> None:
    (tmp_path / "text").write_text("hello, this is no checkpoint at all\n")
    (tmp_path / "folder").mkdir()
    for name in ("text", "folder"):
        with pytest.raises(CheckpointError):
            import_step(tmp_path / name, tmp_path / "b", format)
    with pytest.raises(CheckpointNotFound, match="does not exist"):
        import_step(tmp_path / "none", tmp_path / "b", format)
    with pytest.raises(ConfigError, match="is a URL"):
        import_step("s3://bucket/x", tmp_path / "b", format)
    assert list_steps(tmp_path / "b") == []
