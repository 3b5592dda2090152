"""Export and import: round trips through the stock readers of each format, and what others wrote."""

from __future__ import annotations

import io
import json
import math
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from outlast.checkpoint.convert import export_step, import_step
from outlast.checkpoint.format.records import crc_hex
from outlast.checkpoint.tools import describe, diff, list_steps, verify
from outlast.cli.main import main
from outlast.errors import (
    CheckpointError,
    CorruptCheckpoint,
)
from tests.checkpoint.converting import ALL_DTYPES, FORMATS, ODD, leftovers, needs_safetensors, restored, save
from tests.checkpoint.helpers import save_by_ranks
from tests.checkpoint.state.storable import Colour, Place
from tests.checkpoint.state.storable_rows import CHANGED, STORED
from tests.checkpoint.states import alike, same, state


@pytest.mark.parametrize("format", FORMATS)
def test_round_trip(tmp_path: Path, format: Any) -> None:
    save(tmp_path / "a", ODD)
    done = export_step(tmp_path / "a", tmp_path / "x", format)
    assert (done.step, done.tensors, done.values, done.left_out) == (4, 5, 7, ())
    assert done.size_bytes == sum(path.stat().st_size for path in [tmp_path / "x", *(tmp_path / "x").rglob("*")][-2:])
    back = import_step(tmp_path / "x", tmp_path / "b", format, step=9)
    assert (back.step, back.tensors, back.values) == (9, 5, 7)
    assert [(info.step, info.status) for info in list_steps(tmp_path / "b")] == [(9, "committed")]
    assert verify(tmp_path / "b").ok
    step, got = restored(tmp_path / "b")
    assert step == 9
    assert same(got, ODD)
    assert diff(tmp_path / "a", tmp_path / "b").equal
    assert leftovers(tmp_path) == []


def safetensors_holds(dtype: torch.dtype) -> bool:
    """Older versions of the package know fewer types; none knows complex128."""
    from safetensors.torch import save

    try:
        save({"x": torch.empty(0, dtype=dtype)})
    except (KeyError, ValueError):
        return False
    return True


@pytest.mark.parametrize("format", FORMATS)
def test_every_dtype(tmp_path: Path, format: Any) -> None:
    tensors = dict(ALL_DTYPES)
    if format == "safetensors":
        tensors = {name: tensor for name, tensor in tensors.items() if safetensors_holds(tensor.dtype)}
        assert {"torch.bfloat16", "torch.float8_e4m3fn", "torch.float8_e5m2", "torch.int64"} <= tensors.keys()
    save(tmp_path / "a", tensors)
    export_step(tmp_path / "a", tmp_path / "x", format)
    import_step(tmp_path / "x", tmp_path / "b", format)
    assert same(restored(tmp_path / "b")[1], tensors)


def test_stock_torch_load_reads_the_whole_state(tmp_path: Path) -> None:
    save_by_ranks(tmp_path / "a", 3, 4, world_size=2)
    export_step(tmp_path / "a", tmp_path / "x.pt", "torch", step=3)
    assert same(torch.load(tmp_path / "x.pt", weights_only=True), state(3))
    export_step(tmp_path / "a", tmp_path / "m.pt", "torch", part="model")
    assert same(torch.load(tmp_path / "m.pt", weights_only=True), state(4)["model"])


def test_stock_dcp_load_reads_it(tmp_path: Path) -> None:
    save_by_ranks(tmp_path / "a", 4, world_size=2)
    export_step(tmp_path / "a", tmp_path / "x", "dcp")
    like = {
        "model": {name: torch.zeros_like(tensor) for name, tensor in state(4)["model"].items()},
        "scheduler": {"lr": 0.0, "worst": 0.0},
    }
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(like, checkpoint_id=tmp_path / "x", no_dist=True)
    assert same(like["model"], state(4)["model"])
    assert like["scheduler"] == {"lr": 0.1 / 5, "worst": math.inf}
    module = torch.nn.Linear(3, 2)
    save(tmp_path / "b", {"model": dict(module.state_dict())})
    export_step(tmp_path / "b", tmp_path / "m", "dcp", part="model")
    fresh = torch.nn.Linear(3, 2).state_dict()
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(fresh, checkpoint_id=tmp_path / "m", no_dist=True)
    assert same(dict(fresh), dict(module.state_dict()))


@needs_safetensors
def test_stock_safetensors_reads_it(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    save(tmp_path / "a", ODD)
    export_step(tmp_path / "a", tmp_path / "m", "safetensors", part="model")
    assert same(load_file(tmp_path / "m"), ODD["model"])
    export_step(tmp_path / "a", tmp_path / "x", "safetensors")
    assert set(load_file(tmp_path / "x")) == {"model/a.w", "model/a.b", "model/s", "deep/x/y/z%", "deep/x/y/empty"}
    with safe_open(tmp_path / "x", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["outlast.step"] == "4"
    assert json.loads(metadata["outlast.state"])["numbers"]["list"] == [1, 2.0, {"k": "é"}]


@pytest.mark.parametrize("format", FORMATS)
def test_a_part(tmp_path: Path, format: Any) -> None:
    save(tmp_path / "a", ODD)
    export_step(tmp_path / "a", tmp_path / "x", format, part="model")
    import_step(tmp_path / "x", tmp_path / "b", format, part="model")
    step, got = restored(tmp_path / "b")
    assert step == 0
    assert same(got, {"model": ODD["model"]})
    for part in ("nets", "top"):
        with pytest.raises(CheckpointError, match=r"its parts: .*model"):
            export_step(tmp_path / "a", tmp_path / "y", format, part=part)
    assert not (tmp_path / "y").exists()


def test_files_of_others_are_imported(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    want = module.state_dict()
    torch.save(module.state_dict(), tmp_path / "x.pt")
    torch.save(OrderedDict(module.state_dict()), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("x.pt", "old.pt"):
        import_step(tmp_path / name, tmp_path / f"from-{name}", "torch", part="model")
        assert same(restored(tmp_path / f"from-{name}")[1], {"model": want})
    model = restored(tmp_path / "from-x.pt")[1]["model"]
    assert model._metadata == want._metadata  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"net": module.state_dict(), "step": 3}, checkpoint_id=tmp_path / "x", no_dist=True)
    import_step(tmp_path / "x", tmp_path / "from-dcp", "dcp")
    assert same(restored(tmp_path / "from-dcp")[1], {"net": dict(want), "step": 3})


@needs_safetensors
def test_safetensors_of_others_are_imported(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"a/b.w": torch.ones(2), "c": torch.arange(3)}
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    import_step(tmp_path / "x", tmp_path / "b", "safetensors")
    assert same(restored(tmp_path / "b")[1], tensors)


@needs_safetensors
def test_safetensors_of_the_version_before_are_imported(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"model/a/b": torch.ones(2), "model/c": torch.arange(3)}
    texts = {
        "outlast.step": "7",
        "outlast.values": json.dumps({"model": {}, "lr": 0.1, "betas": {"outlast_tuple": [0.9, 0.99]}}),
        "outlast.paths": json.dumps({"model/a/b": ["model", "a/b"]}),
    }
    crcs = {"__metadata__": crc_hex("\n".join(texts.values()).encode())}
    for name, tensor in tensors.items():
        kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode()
        crcs[name] = crc_hex(kind, tensor.view(torch.uint8).numpy().data)
    save_file(tensors, tmp_path / "x", metadata={**texts, "outlast.crc32c": json.dumps(crcs)})
    import_step(tmp_path / "x", tmp_path / "b", "safetensors")
    want = {"model": {"a/b": torch.ones(2), "c": torch.arange(3)}, "lr": 0.1, "betas": (0.9, 0.99)}
    assert same(restored(tmp_path / "b")[1], want)


@pytest.mark.parametrize("row", [*STORED, *CHANGED])
@needs_safetensors
def test_whatever_can_be_stored_goes_to_safetensors_and_back(tmp_path: Path, row: str) -> None:
    values = [*STORED.get(row, ()), *(value for value, _ in CHANGED.get(row, ()))]
    save(tmp_path / "a", {"values": values})
    export_step(tmp_path / "a", tmp_path / "x", "safetensors")
    import_step(tmp_path / "x", tmp_path / "b", "safetensors")
    assert alike(restored(tmp_path / "b")[1], restored(tmp_path / "a")[1])


@pytest.mark.parametrize("format", ["torch", "dcp"])
@pytest.mark.parametrize("value", [frozenset({1}), range(3), np.float32(1), np.ones(2), Place(1), Colour.RED])
def test_what_torch_does_not_read_back_is_not_exported(tmp_path: Path, format: Any, value: Any) -> None:
    save(tmp_path / "a", {"model": {"w": torch.ones(1), "deep": [{"v": value}]}})
    with pytest.raises(CheckpointError, match="'model/deep/0/v' is a "):
        export_step(tmp_path / "a", tmp_path / "x", format)
    assert not (tmp_path / "x").exists()


def test_views_and_parameters_are_imported(tmp_path: Path) -> None:
    w = torch.nn.Parameter(torch.ones(3))
    c = torch.tensor([1 + 2j]).conj()
    odd = {"tied": w, "again": w, "wide": torch.ones(1).expand(4), "t": torch.arange(6).reshape(2, 3).t(), "c": c}
    torch.save(odd, tmp_path / "x")
    import_step(tmp_path / "x", tmp_path / "b", "torch")
    got = restored(tmp_path / "b")[1]
    assert {name: value.tolist() for name, value in got.items()} == {name: t.tolist() for name, t in odd.items()}


def test_shards_of_many_ranks_are_joined(tmp_path: Path) -> None:
    """A tensor in two chunks of two files, as a run of two ranks leaves it."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    whole = torch.arange(15).reshape(5, 3)
    chunks, places = [], {}
    for index, rows in enumerate(((0, 3), (3, 2))):
        data = io.BytesIO()
        torch.save(whole[rows[0] : sum(rows)].clone(), data)
        (tmp_path / f"__{index}_0.distcp").write_bytes(b"before" + data.getvalue())
        chunks.append(ChunkStorageMetadata(torch.Size([rows[0], 0]), torch.Size([rows[1], 3])))
        where = MetadataIndex("w", torch.Size([rows[0], 0]), index)
        places[where] = _StorageInfo(f"__{index}_0.distcp", 6, len(data.getvalue()))
    properties = TensorProperties(dtype=torch.int64)
    entry = TensorStorageMetadata(properties, whole.size(), chunks)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"w": entry}, None, places)))
    import_step(tmp_path, tmp_path / "b", "dcp")
    assert same(restored(tmp_path / "b")[1], {"w": whole})
    entry.chunks.pop()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"w": entry}, None, places)))
    with pytest.raises(CorruptCheckpoint, match="parts of the tensor 'w' are missing"):
        import_step(tmp_path, tmp_path / "c", "dcp")


def test_from_and_to_an_object_store(tmp_path: Path) -> None:
    torch.save(ODD, tmp_path / "x")
    import_step(tmp_path / "x", "memory://convert", "torch", step=3)
    export_step("memory://convert", tmp_path / "y", "torch")
    assert same(torch.load(tmp_path / "y", weights_only=True), ODD)


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "a", ODD)
    x, a, b = str(tmp_path / "x"), str(tmp_path / "a"), str(tmp_path / "b")
    words = ["--format", "torch", "--part", "model"]
    assert main(["ckpt", "export", a, x, *words]) == 0
    assert f"written: {x} (torch): 3 tensors and 0 values" in capsys.readouterr().out
    assert main(["ckpt", "export", a, x, *words]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["ckpt", "export", a, x, *words, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 3
    assert main(["ckpt", "import", x, b, *words, "--step", "7"]) == 0
    assert f"saved: step 7 at {b}: 3 tensors" in capsys.readouterr().out
    assert main(["ckpt", "show", b, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 7
    assert main(["ckpt", "verify", b]) == 0
    assert main(["ckpt", "import", x, b, *words, "--step", "7"]) == 1
    with pytest.raises(SystemExit) as stopped:
        main(["ckpt", "export", a, x, "--format", "onnx"])
    assert stopped.value.code == 2


@needs_safetensors
def test_an_optimizers_own_state_comes_from_torch_and_goes_back(tmp_path: Path) -> None:
    """Integer keys and tuples, in every format."""
    from safetensors.torch import load_file

    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], betas=(0.8, 0.9))
    weight.grad = torch.ones(3)
    optimizer.step()
    state = {"optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "x")
    import_step(tmp_path / "x", tmp_path / "b", "torch")
    export_step(tmp_path / "b", tmp_path / "y", "torch")
    back = torch.load(tmp_path / "y", weights_only=True)
    assert same(back, state)
    assert isinstance(back["optimizer"]["param_groups"][0]["betas"], tuple)
    assert {t.name for t in describe(tmp_path / "b").tensors} >= {"optimizer/state/0/exp_avg"}
    export_step(tmp_path / "b", tmp_path / "z", "safetensors")
    import_step(tmp_path / "z", tmp_path / "c", "safetensors")
    assert same(restored(tmp_path / "c")[1], state)
    assert set(load_file(tmp_path / "z")) == {f"optimizer/state/0/{name}" for name in ("step", "exp_avg", "exp_avg_sq")}
