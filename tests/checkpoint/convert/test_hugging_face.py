"""Folders as Hugging Face writes them: what `from_pretrained` reads, import reads, and it reads what export wrote."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.checkpoint.convert import export_step, import_step
from outlast.checkpoint.tools import list_steps
from outlast.cli.main import main
from outlast.errors import CheckpointError, CorruptCheckpoint
from tests.checkpoint.converting import FORMATS, needs_safetensors, restored, save
from tests.checkpoint.states import same

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed (extra dev)"
)
TENSORS = {f"layer.{n}.weight": torch.full((2, 3), float(n)) for n in range(5)}


def write(folder: Path, format: str, name: str, tensors: dict[str, torch.Tensor]) -> None:
    if format == "torch":
        torch.save(tensors, folder / name)
        return
    from safetensors.torch import save_file

    save_file(tensors, folder / name, metadata={"format": "pt"})


def sharded(folder: Path, format: str, places: dict[str, str] | None = None) -> Path:
    """TENSORS in two shards, with an index."""
    folder.mkdir()
    stem, ending = ("model", "safetensors") if format == "safetensors" else ("pytorch_model", "bin")
    shards = [f"{stem}-0000{n}-of-00002.{ending}" for n in (1, 2)]
    names = list(TENSORS)
    write(folder, format, shards[0], {name: TENSORS[name] for name in names[:2]})
    write(folder, format, shards[1], {name: TENSORS[name] for name in names[2:]})
    places = places or {name: shards[index >= 2] for index, name in enumerate(names)}
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 120}, "weight_map": places}))
    return index


@pytest.fixture(params=["torch", pytest.param("safetensors", marks=needs_safetensors)])
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_shards_are_imported_by_folder_and_by_index(tmp_path: Path, format: Any) -> None:
    index = sharded(tmp_path / "hub", format)
    for number, source in enumerate((tmp_path / "hub", index)):
        done = import_step(source, tmp_path / "b", format, step=number, part="model")
        assert done.tensors == 5
    assert same(restored(tmp_path / "b")[1], {"model": TENSORS})


def test_a_folder_of_links_into_a_cache_is_imported(tmp_path: Path, format: Any) -> None:
    sharded(tmp_path / "blobs", format)
    (tmp_path / "snapshot").mkdir()
    for blob in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / blob.name).symlink_to(Path("..") / "blobs" / blob.name)
    main(["ckpt", "import", str(tmp_path / "snapshot"), str(tmp_path / "b"), "--format", format, "--part", "model"])
    assert same(restored(tmp_path / "b")[1], {"model": TENSORS})


def test_a_folder_with_one_file_is_imported(tmp_path: Path, format: Any) -> None:
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub", format, "model.safetensors" if format == "safetensors" else "pytorch_model.bin", TENSORS)
    import_step(tmp_path / "hub", tmp_path / "b", format)
    assert same(restored(tmp_path / "b")[1], TENSORS)


BAD: dict[str, tuple[Any, type[CheckpointError], str]] = {
    "outside": ({"a": "../secret.safetensors"}, CheckpointError, "not beside it"),
    "absolute": ({"a": "/etc/passwd"}, CheckpointError, "not beside it"),
    "missing shard": ({"a": "other.safetensors"}, CorruptCheckpoint, "is missing"),
    "missing tensor": ({"a": "{first}"}, CorruptCheckpoint, "has no tensor 'a'"),
    "no map": ([1], CorruptCheckpoint, "not an index"),
    "no names": ({"a": 5}, CorruptCheckpoint, "not an index"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, format: Any, case: str) -> None:
    places, kind, word = BAD[case]
    index = sharded(tmp_path / "hub", format)
    first = sorted(json.loads(index.read_text())["weight_map"].values())[0]
    if isinstance(places, dict):
        places = {name: first if place == "{first}" else place for name, place in places.items()}
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(kind, match=word):
        import_step(tmp_path / "hub", tmp_path / "b", format)
    assert list_steps(tmp_path / "b") == []


@pytest.mark.parametrize("text", ["", "[", "[]", '{"weight_map": ' + "[" * 100_000, "\xff"])
def test_an_index_that_is_no_json_is_named(tmp_path: Path, format: Any, text: str) -> None:
    sharded(tmp_path / "hub", format).write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptCheckpoint, match=r"index\.json is not an index"):
        import_step(tmp_path / "hub", tmp_path / "b", format)


def test_a_folder_without_weights_says_what_there_is(tmp_path: Path, format: Any) -> None:
    (tmp_path / "hub").mkdir()
    ending = "safetensors" if format == "safetensors" else "bin"
    write(tmp_path / "hub", format, f"model.fp16.{ending}", TENSORS)
    with pytest.raises(CheckpointError, match=rf"pass one of its files: model\.fp16\.{ending}"):
        import_step(tmp_path / "hub", tmp_path / "b", format)
    import_step(tmp_path / "hub" / f"model.fp16.{ending}", tmp_path / "b", format)
    assert same(restored(tmp_path / "b")[1], TENSORS)


@needs_transformers
@needs_safetensors
def test_a_model_goes_from_the_hub_through_a_step_and_back(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=100, n_positions=16))
    model.save_pretrained(tmp_path / "hub", max_shard_size="40KB")
    assert len(list((tmp_path / "hub").glob("model-*.safetensors"))) > 1
    import_step(tmp_path / "hub", tmp_path / "b", "safetensors", part="model")
    found = restored(tmp_path / "b")[1]["model"]
    ours = AutoModelForCausalLM.from_config(model.config)
    ours.load_state_dict(found, strict=False)
    ours.tie_weights()
    assert same(dict(ours.state_dict()), dict(model.state_dict()))

    (tmp_path / "back").mkdir()
    model.config.save_pretrained(tmp_path / "back")
    export_step(tmp_path / "b", tmp_path / "back" / "model.safetensors", "safetensors", part="model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert same(dict(theirs.state_dict()), dict(model.state_dict()))


@pytest.fixture(params=[0o002, 0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("kind", FORMATS)
def test_all_files_obey_the_umask(tmp_path: Path, umask: int, kind: Any) -> None:
    save(tmp_path / "a", {"model": {"w": torch.ones(500_000), "b": torch.ones(2)}, "step": 5})
    export_step(tmp_path / "a", tmp_path / "x", kind)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    for path, mode in modes.items():
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, path
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
