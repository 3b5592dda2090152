"""Which bytes go into which file and by whom: all of them, once, in equal shares; and the memory they go through."""

from __future__ import annotations

import itertools
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from outlast.checkpoint import (
    CheckpointConfig,
)
from outlast.checkpoint.memory.arena import PAGE_BYTES, Arena, room
from outlast.checkpoint.save.chunk_grid import chunk_shape
from outlast.checkpoint.save.plan import plan_rank
from outlast.checkpoint.state.tree import StateTree, lay_out
from outlast.checkpoint.storage.local import LocalStore
from outlast.checkpoint.tools import list_steps, verify
from outlast.errors import ConfigError, StateMismatch
from outlast.events import CheckpointSaved, Event
from tests.checkpoint.helpers import checkpointer, failed, of, save_by_ranks
from tests.checkpoint.states import same, state

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@given(shapes, st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 400))
def test_chunks_are_whole_rows_of_at_most_so_many_bytes(shape: tuple[int, ...], itemsize: int, limit: int) -> None:
    chunk = chunk_shape(shape, itemsize, limit)
    assert len(chunk) == len(shape)
    if math.prod(shape):
        assert itemsize * math.prod(chunk) <= max(limit, itemsize)
        cut = [d for d, (size, rows) in enumerate(zip(shape, chunk, strict=True)) if rows < size]
        assert all(chunk[d] == 1 for d in cut[:-1])
        # No chunk less would do, and the last one is padded by less than a row for each of them.
        assert not cut or itemsize * math.prod(chunk) * (1 + 1 / chunk[cut[-1]]) * 2 > limit


@given(
    st.lists(st.tuples(shapes, st.booleans()), max_size=8),
    st.integers(1, 5),
    st.integers(8, 300),
    st.sampled_from([0, 40, 10_000]),
)
def test_every_byte_is_written_once_in_equal_shares(
    tensors: list[tuple[tuple[int, ...], bool]], ranks: int, chunk_bytes: int, pack_below: int
) -> None:
    plan = StateTree()
    groups: dict[str, dict[str, torch.Tensor]] = {"a": {}, "b": {}}
    for index, (shape, eager) in enumerate(tensors):
        groups["a" if eager else "b"][str(index)] = torch.randn(shape)
    lay_out(plan, groups, "", eager={"a"})
    shares = [
        plan_rank(plan, StateTree(), rank, ranks, chunk_bytes=chunk_bytes, pack_below_bytes=pack_below)
        for rank in range(ranks)
    ]
    files = [part.path for share in shares for part in share.parts] + [d for share in shares for d in share.documents]
    assert len(files) == len(set(files))
    covered = {item.path: torch.zeros(item.tensor.shape) for item in plan.items}
    total = sum(item.tensor.nbytes for item in plan.items)
    for share in shares:
        assert [part.eager for part in share.parts] == sorted((part.eager for part in share.parts), reverse=True)
        written = 0
        for part in share.parts:
            assert len({content.item.eager for content in part.contents} | {part.eager}) == 1
            for content in part.contents:
                written += content.source.nbytes
                tensor = content.item.tensor
                view = torch.as_strided(
                    covered[content.item.path],
                    content.source.shape,
                    content.source.stride(),
                    content.source.storage_offset() - tensor.storage_offset(),
                )
                view += 1
        largest = max([chunk_bytes, *(item.tensor.nbytes for item in plan.items if item.tensor.nbytes < pack_below)])
        assert abs(written - total / ranks) <= largest
        assert share.digest == shares[0].digest
    assert all((count == 1).all() for count in covered.values())


def large(step: int) -> dict[str, Any]:
    return {
        "model": {
            "embedding": torch.arange(5000.0).reshape(100, 50) + step,
            "odd": torch.arange(7 * 11 * 13.0).reshape(7, 11, 13).to(torch.bfloat16),
            "scalar": torch.tensor(3.0 + step),
            "flags": torch.arange(300) % 3 == 0,
            "none": torch.empty(0, 5),
            "turned": torch.arange(600.0).reshape(20, 30).t(),
        },
        "lr": 0.1 * step,
    }


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("host_memory_mb", [0.0, 0.008])
@pytest.mark.parametrize("pack_below_kb", [0.0, 64.0])
def test_chunked_and_packed_state_comes_back(
    tmp_path: Path, ranks: int, host_memory_mb: float, pack_below_kb: float
) -> None:
    settings = {"chunk_mb": 0.002, "host_memory_mb": host_memory_mb, "pack_below_kb": pack_below_kb}
    own = {"rng": {"s": torch.arange(5)}, "comm": {"e": torch.arange(3000.0)}}
    events: list[list[Event]] = [[] for _ in range(ranks)]
    savers = [checkpointer(tmp_path, events[rank], rank=rank, world_size=ranks, **settings) for rank in range(ranks)]
    threads = []
    for saver in savers:

        def save(saver: Any = saver) -> None:
            saver.save(1, replicated=large(1), local=own, eager={"rng", "comm"})
            saver.close()

        threads.append(threading.Thread(target=save))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert [failed(seen) for seen in events] == [[]] * ranks
    assert verify(tmp_path, 1).ok
    if host_memory_mb:
        assert all(saver._arena.nbytes <= 64_000 + PAGE_BYTES for saver in savers)
    sizes = [event.size_bytes for seen in events for event in of(CheckpointSaved, seen)]
    assert sum(sizes) == list_steps(tmp_path)[0].size_bytes
    if ranks == 1:
        back = checkpointer(tmp_path, attempt_id="two").restore(1)
        assert back is not None
        assert same(back.replicated, large(1))
        assert same(back.local, own)
    model = zarr.open_group(str(tmp_path / "step_00000001"), mode="r")["model"]
    assert isinstance(model, zarr.Group)
    if not pack_below_kb:
        for name, tensor in large(1)["model"].items():
            stored = model[name]
            assert isinstance(stored, zarr.Array)
            as_numpy = tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor
            assert np.array_equal(np.asarray(stored[...]), as_numpy.numpy()), name


def test_stock_zarr_reads_a_packed_tensor(tmp_path: Path) -> None:
    with checkpointer(tmp_path, pack_below_kb=64.0) as saver:
        saver.save(1, replicated=state(1), local={})
    step = zarr.open_group(str(tmp_path / "step_00000001"), mode="r")
    pack = step["packed/rank_00000.0"]
    assert isinstance(pack, zarr.Array)
    index: Any = pack.attrs["outlast_packed"]
    offset, shape, dtype = index["model/blocks.0.attn.qkv.weight"]
    raw = np.asarray(pack[offset : offset + 4 * math.prod(shape)])
    assert np.array_equal(raw.view(dtype).reshape(shape), state(1)["model"]["blocks.0.attn.qkv.weight"].numpy())


def test_ranks_whose_replicated_state_differs(tmp_path: Path) -> None:
    events: list[Event] = []
    one = checkpointer(tmp_path, events, rank=0, world_size=2)
    two = checkpointer(tmp_path, rank=1, world_size=2)
    one.save(1, replicated={"model": {"w": torch.ones(3)}}, local={})
    two.save(1, replicated={"model": {"w": torch.ones(4)}}, local={})
    two.wait_copied()
    with pytest.raises(StateMismatch, match="replicated state of rank 1"):
        one.close()
    two.close()
    assert "names, shapes or types" in failed(events)[0]
    assert [info.status for info in list_steps(tmp_path)] in ([], ["uncommitted"])


def test_a_share_is_cut_from_large_tensors(tmp_path: Path) -> None:
    events = save_by_ranks(tmp_path, 1, world_size=4, chunk_mb=0.001, pack_below_kb=0)
    assert [failed(seen) for seen in events] == [[]] * 4
    assert verify(tmp_path, 1).ok


@given(st.lists(st.integers(1, 5 * PAGE_BYTES), min_size=1, max_size=30), st.randoms())
def test_regions_of_the_arena_are_apart_and_come_back(sizes: list[int], random: Any) -> None:
    limit = 8 * PAGE_BYTES
    arena = Arena(limit)
    arena.reserve(sizes, pinned=False)
    assert arena.nbytes == min(limit, sum(map(room, sizes)))
    taken = []
    for size in sizes:
        while (region := arena.take(size)) is None:
            assert taken
            arena.give_back(taken.pop(random.randrange(len(taken))))
        assert region.memory.data_ptr() % PAGE_BYTES == 0
        assert region.nbytes >= size
        taken.append(region)
        spans = sorted((r.offset, r.offset + r.nbytes) for r in taken)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    for region in taken:
        arena.give_back(region)
    whole = arena.take(arena.nbytes)
    assert whole is not None


def test_memory_for_less_than_four_chunks_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 4 chunks"):
        CheckpointConfig(host_memory_mb=100, chunk_mb=32)


def test_large_blocks_go_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outlast.checkpoint.storage.local.DIRECT_FROM_BYTES", 8192)
    store = LocalStore(str(tmp_path))
    arena = Arena()
    arena.reserve([20_000], pinned=False)
    region = arena.take(20_000)
    assert region is not None
    region.memory.copy_(torch.arange(region.nbytes) % 251)
    block = region.memory.numpy().data
    store.put_block("a/b", block, 19_999)
    assert (tmp_path / "a" / "b").read_bytes() == bytes(block[:19_999])
    store.put_block("a/b", block, 5)  # again, shorter, through the cache
    assert (tmp_path / "a" / "b").read_bytes() == bytes(block[:5])
