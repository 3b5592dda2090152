"""Where batches come from: token files, datasets in our order, and streams that go on exactly."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from outlast.config import load, split_overrides
from outlast.errors import ConfigError, DataError
from outlast.trainer.config import Config
from outlast.trainer.sources import Source, build_sources, check_data
from tests.helpers import arrays, outlast

MODULE = """
import random
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

class Squares(Dataset):
    def __init__(self, count=40, offset=0): self.count, self.offset = count, offset
    def __len__(self): return self.count
    def __getitem__(self, index):
        x = torch.full((3,), float(index + self.offset))
        return x, (index + self.offset) % 2

class Stream(IterableDataset):
    def __init__(self, split, rank, world_size): self.start, self.by = rank, world_size; self.split = split
    def __iter__(self):
        for index in range(self.start, 30, self.by):
            yield {"x": torch.tensor([index + random.random(), float(torch.rand(()))])}

def shuffled(batch_size): return DataLoader(Squares(), batch_size=batch_size, shuffle=True)
def stateful(batch_size):
    from torchdata.stateful_dataloader import StatefulDataLoader
    return StatefulDataLoader(Squares(), batch_size=batch_size, shuffle=True)
def once(): return (torch.zeros(2) for _ in range(3))
class Unsteady:
    def __iter__(self):
        import os
        while True:
            yield torch.frombuffer(bytearray(os.urandom(8)), dtype=torch.uint8)
def number(): return 7
def first_only(samples): return torch.stack([sample[0] for sample in samples])
"""


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beside")
    (folder / "users_data.py").write_text(MODULE)
    return folder


@pytest.fixture(autouse=True)
def _found(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(beside))


def settings(*words: str) -> Config:
    return load(Config, None, {}, split_overrides(["--data.batch_size", "4", *words])[1])


def source(*words: str, rank: int = 0, ranks: int = 1) -> Source:
    return build_sources(settings(*words), rank, ranks)[0]


def flat(batches: list[Any]) -> list[float]:
    """All numbers in the first tensors of batches."""
    found = []
    for batch in batches:
        tensor = (
            next(iter(batch.values()))
            if isinstance(batch, dict)
            else batch[0]
            if isinstance(batch, (list, tuple))
            else batch
        )
        found += tensor.double().flatten().tolist()
    return found


def megatron(path: Path, tokens: np.ndarray[Any, Any], code: int, lengths: list[int]) -> None:
    path.write_bytes(tokens.tobytes())
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, len(lengths), 1)
    path.with_suffix(".idx").write_bytes(header + np.array(lengths, "<i4").tobytes() + bytes(8 * len(lengths) + 8))


def files(folder: Path, form: str) -> list[str]:
    return ["--data.files", f"{folder}/train.bin", "--data.held_out_files", f"{folder}/val.bin", "--data.format", form]


@pytest.mark.parametrize(("form", "dtype"), [("uint16", "<u2"), ("uint32", "<u4"), ("megatron", "<i4")])
def test_token_files_are_read_as_they_were_written(tmp_path: Path, form: str, dtype: str) -> None:
    tokens = np.arange(1, 400).astype(dtype) * 7
    for name in ("train", "val"):
        if form == "megatron":
            megatron(tmp_path / f"{name}.bin", tokens, 4, [300, 99])
        else:
            (tmp_path / f"{name}.bin").write_bytes(tokens.tobytes())
    words = [*files(tmp_path, form), "--model.context", "9", "--model.vocabulary", "3000"]
    training, held_out = build_sources(settings(*words), 0, 1)
    for found in (training, held_out):
        assert found is not None
        for x, y in found.batches(1):
            assert torch.equal(x + 7, y)
            assert x.shape == (4, 9)
    with pytest.raises(DataError, match=r"has a token \d+, and model.vocabulary = 256"):
        [source(*words[:-2]).batches(step) for step in range(1, 11)]


def test_files_that_do_not_hold_what_was_said(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(bytes(4001))
    (tmp_path / "val.bin").write_bytes(bytes(4000))
    with pytest.raises(DataError, match="no whole number of uint16 tokens"):
        source(*files(tmp_path, "uint16"))
    with pytest.raises(DataError, match=r"the index of .*train\.bin cannot be read"):
        source(*files(tmp_path, "megatron"))
    (tmp_path / "train.idx").write_bytes(b"nothing of the kind, and long enough for a header")
    with pytest.raises(DataError, match="not an index of Megatron"):
        source(*files(tmp_path, "megatron"))
    megatron(tmp_path / "train.bin", np.zeros(100, "<u2"), 8, [60, 41])
    with pytest.raises(DataError, match="counts 101 tokens of 2 bytes"):
        source(*files(tmp_path, "megatron"))
    megatron(tmp_path / "train.bin", np.zeros(100, "<u2"), 8, [100])
    megatron(tmp_path / "val.bin", np.zeros(100, "<i4"), 4, [100])
    with pytest.raises(DataError, match="of different types"):
        source(*files(tmp_path, "megatron"))


SQUARES = ["--data.factory", "users_data:Squares"]


def test_a_dataset_is_taken_once_an_epoch_over_all_ranks_and_goes_on_with_others() -> None:
    seen: list[float] = []
    for step in (1, 2):
        for rank in range(2):
            seen += flat(source(*SQUARES, "--data.held_out_share", "0.2", rank=rank, ranks=2).batches(step))[::3]
    saved = source(*SQUARES, "--data.held_out_share", "0.2", rank=0, ranks=2).state()
    for step in (3, 4, 5, 6):
        resumed = source(*SQUARES, "--data.held_out_share", "0.2").resumed_from(saved, 2)
        seen += flat(resumed.batches(step))[::3]
    assert sorted(seen) == list(range(32))
    held_out = build_sources(settings(*SQUARES, "--data.held_out_share", "0.2"), 0, 1)[1]
    assert held_out is not None
    assert min(flat(held_out.batches(1))) >= 32
    other = build_sources(settings(*SQUARES, "--data.held_out_arguments.offset", "100"), 0, 1)[1]
    assert other is not None
    assert min(flat(other.batches(1))) >= 100
    with pytest.raises(DataError, match="Squares has 3 samples for this"):
        source(*SQUARES, "--data.arguments.count", "4", "--data.held_out_share", "0.2")
    with pytest.raises(DataError, match="data fingerprint"):
        source(*SQUARES, "--data.held_out_share", "0.1").resumed_from(saved, 2)
    by_hand = source(*SQUARES, "--data.held_out_share", "0.2", "--data.collate", "users_data:first_only").batches(1)
    assert by_hand[0].shape == (4, 3)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata's own
@pytest.mark.parametrize("name", ["shuffled", "stateful", "Stream"])
@pytest.mark.parametrize("at", [1, 4, 11])
def test_a_stream_goes_on_exactly(name: str, at: int) -> None:
    if name == "stateful":
        pytest.importorskip("torchdata", reason="torchdata is not installed: pip install 'outlast[data]'")
    words = ["--data.factory", f"users_data:{name}", "--trainer.accumulate", "2"]
    straight = source(*words)
    expected = []
    for step in range(1, at + 6):
        torch.rand(step), random.random()  # what a model draws
        expected.append(flat(straight.batches(step)))
    first = source(*words)
    for step in range(1, at + 1):
        assert flat(first.batches(step)) == expected[step - 1]
    state, local = first.state(), first.local_state()
    before = torch.get_rng_state()
    second = source(*words).resumed_from(state, at, local)
    assert torch.equal(torch.get_rng_state(), before)
    for step in range(at + 1, at + 6):
        assert flat(second.batches(step)) == expected[step - 1]
    assert expected[0] != expected[1]
    with pytest.raises(DataError, match="each rank's own"):
        source(*words, ranks=2).resumed_from(state, at)


def test_what_is_no_stream_or_does_not_repeat_is_refused() -> None:
    with pytest.raises(ConfigError, match="returned a int, which is no dataset"):
        source("--data.factory", "users_data:number")
    with pytest.raises(ConfigError, match="has no argument 'cuont'") as caught:
        check_data(settings(*SQUARES, "--data.arguments.cuont", "3"))
    assert "count" in str(caught.value)
    once = source("--data.factory", "users_data:once")
    with pytest.raises(DataError, match="has no batch in epoch 1") as told:
        [once.batches(step) for step in range(9)]
    assert "wrap it in a class" in str(told.value)
    unsteady = source("--data.factory", "users_data:Unsteady")
    unsteady.batches(1)
    with pytest.raises(DataError, match="does not give the same again"):
        source("--data.factory", "users_data:Unsteady").resumed_from(unsteady.state(), 1, unsteady.local_state())
    assert build_sources(settings("--data.factory", "users_data:once"), 0, 1)[1] is None


def test_types_of_torch_are_told_apart() -> None:
    class Both(IterableDataset[float]):
        def __iter__(self) -> Iterator[float]:
            return iter([1.0])

        def __len__(self) -> int:
            return 1

    assert len(DataLoader([1, 2])) == 2  # a loader has a length, and is no dataset
    assert len(Both()) == 1


@pytest.mark.parametrize("name", ["Squares", "shuffled"])
def test_a_run_on_a_dataset_goes_on_bit_for_bit(tmp_path: Path, beside: Path, name: str) -> None:
    file = beside / f"{name}.toml"
    file.write_text(
        f"""
[model]
factory = "torch.nn:Linear"
arguments = {{in_features = 3, out_features = 2}}
loss = "torch.nn:CrossEntropyLoss"
[data]
factory = "users_data:{name}"
batch_size = 4
held_out_share = 0.2
[trainer]
eval_batches = 1
[comm]
compressor = "dense"
[checkpoint]
every_steps = 3
keep_last = 0
pack_below_kb = 0
"""
    )
    for run, steps in (("straight", "6"), ("halves", "3"), ("halves", "6")):
        schedule = ["--optim.warmup-steps", "0", "--optim.min-lr-share", "1"]  # no decay, which goes by the last step
        words = ["--run.dir", tmp_path / run, "--trainer.steps", steps, "--resume", "auto", *schedule]
        told = outlast("train", file, *words)
        assert ("held-out loss" in told.stderr + told.stdout) == (name == "Squares")
    one, other = (arrays(tmp_path / run / "checkpoints" / "step_00000006") for run in ("straight", "halves"))
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].tobytes() == other[key].tobytes(), key
