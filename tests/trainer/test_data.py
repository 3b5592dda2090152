"""Text in an order that depends on (seed, step, rank, world size) alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outlast.errors import DataError
from outlast.trainer.config import DataConfig
from outlast.trainer.data import Corpus, Loader, find_files, permute, split_held_out


@given(st.integers(1, 3000), st.binary(max_size=20))
def test_permute_is_a_permutation(size: int, key: bytes) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permute_depends_on_its_key() -> None:
    orders = {tuple(permute(i, 100, str(k).encode()) for i in range(100)) for k in range(20)}
    assert len(orders) == 20


def corpus(folder: Path, sizes: list[int]) -> Corpus:
    value = 0
    files = []
    for number, size in enumerate(sizes):
        path = folder / f"f{number:03d}.txt"
        path.write_bytes(bytes((value + i) % 251 for i in range(size)))
        value += size
        files.append(path)
    return Corpus(files)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.data())
def test_reading_crosses_file_borders(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject
) -> None:
    text = corpus(tmp_path_factory.mktemp("text"), sizes)
    assert len(text) == sum(sizes)
    start = data.draw(st.integers(0, len(text) - 1))
    count = data.draw(st.integers(0, len(text) - start))
    assert text.read(start, count).tolist() == [(start + i) % 251 for i in range(count)]


def test_more_files_than_maps_are_kept_open(tmp_path: Path) -> None:
    text = corpus(tmp_path, [3] * 600)
    assert text.read(0, 1800).tolist() == [i % 251 for i in range(1800)]
    assert len(text._maps) <= 256


def loader(text: Corpus, rank: int, world_size: int, seed: int = 0, accumulate: int = 1) -> Loader:
    return Loader(text, context=10, batch_size=2, accumulate=accumulate, seed=seed, rank=rank, world_size=world_size)


def test_an_epoch_shows_every_window_once_over_all_ranks(tmp_path: Path) -> None:
    text = corpus(tmp_path, [401])  # 40 windows: 10 steps of 2 ranks x 2 sequences
    rows = [
        tuple(row)
        for step in range(1, 11)
        for rank in range(2)
        for tokens, _ in loader(text, rank, 2).batches(step)
        for row in tokens.tolist()
    ]
    assert sorted(rows) == sorted(tuple((w * 10 + i) % 251 for i in range(10)) for w in range(40))
    second = [loader(text, 0, 2).window(40 + n) for n in range(40)]
    assert sorted(second) == list(range(40))
    assert second != [loader(text, 0, 2).window(n) for n in range(40)]


def test_targets_follow_tokens_and_steps_can_be_read_in_any_order(tmp_path: Path) -> None:
    text = corpus(tmp_path, [500, 700])
    one = loader(text, 1, 3, accumulate=2)
    forwards = [one.batches(step) for step in range(1, 6)]
    backwards = [loader(text, 1, 3, accumulate=2).batches(step) for step in range(5, 0, -1)][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert len(a) == 2
        for (x, y), (x2, y2) in zip(a, b, strict=True):
            assert x.shape == y.shape == (2, 10)
            assert x.dtype == torch.int64
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)
            assert torch.equal(x[:, 1:], y[:, :-1])
    assert not torch.equal(forwards[0][0][0], loader(text, 1, 3, seed=1, accumulate=2).batches(1)[0][0])


def test_other_data_than_the_checkpoint_had_is_refused(tmp_path: Path) -> None:
    text = corpus(tmp_path, [500])
    saved = loader(text, 0, 2).state()
    assert loader(text, 1, 2).resumed_from(saved, 3) == loader(text, 1, 2)
    with pytest.raises(DataError, match="seed = 0, this run 1"):
        loader(text, 0, 2, seed=1).resumed_from(saved, 3)
    moved = loader(text, 0, 3).resumed_from(saved, 3)  # a step takes another number of windows
    assert (moved.origin_step, moved.origin_window) == (3, 3 * 4)
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="fingerprint"):
        loader(corpus(tmp_path / "other", [501]), 0, 2).resumed_from(saved, 3)


def test_other_numbers_of_ranks_go_on_with_the_next_window(tmp_path: Path) -> None:
    text = corpus(tmp_path, [500])
    seen: list[int] = []
    done, saved = 0, loader(text, 0, 4).state()
    for ranks, steps in ((4, 3), (2, 5), (3, 2), (4, 1)):
        loaders = [loader(text, rank, ranks).resumed_from(saved, done) for rank in range(ranks)]
        for step in range(done + 1, done + steps + 1):
            for one in loaders:
                for tokens, _ in one.batches(step):
                    windows = {tuple(text.read(w * 10, 10)): w for w in range(one.windows)}
                    seen += [windows[tuple(row)] for row in tokens.to(torch.uint8).numpy()]
        done, saved = done + steps, loaders[0].state()
    first = loader(text, 0, 4)
    assert seen == [first.window(number) for number in range(len(seen))]
    assert len(seen) == 2 * (4 * 3 + 2 * 5 + 3 * 2 + 4)


def test_no_data_and_too_little_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data: 0 files match .*none\.txt"):
        find_files(DataConfig(files=(str(tmp_path / "none.txt"),)))
    with pytest.raises(DataError, match="2 windows of 10 tokens, but one step of 2 ranks takes 4"):
        loader(corpus(tmp_path, [25]), 0, 2)
    one = tmp_path / "f000.txt"
    with pytest.raises(DataError, match="held out"):
        split_held_out([one], 0.5)


def test_the_standard_library_is_found_and_split(tmp_path: Path) -> None:
    files = find_files(DataConfig())
    assert len(files) > 100
    assert not any("site-packages" in str(file) for file in files)
    training, held_out = split_held_out(files, 0.05)
    assert set(training).isdisjoint(held_out)
    assert 0.01 < len(held_out) / len(files) < 0.15
