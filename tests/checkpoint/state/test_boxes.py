"""Where shards lie, as arithmetic: every layout tiles its tensor once, and any other layout reads it back."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from outlast.checkpoint.format.zarr import CRC_BYTES, ArrayInfo, as_tensor, chunk_name, parse_node, payload, put_chunk
from outlast.checkpoint.save.chunk_grid import shard_chunk_shape
from outlast.checkpoint.save.plan import RankPlan, plan_rank
from outlast.checkpoint.save.snapshot import Snapshot
from outlast.checkpoint.state.boxes import Box, ShardLayout, Split, divisors, spread_over
from outlast.checkpoint.state.target import part_of
from outlast.checkpoint.state.tree import StateTree, TensorEntry
from outlast.errors import CheckpointError

Layout = tuple[tuple[int, ...], tuple[Split, ...]]
"""Shape of a mesh, and what each of its dimensions does."""

FSDP3: Layout = (3,), (Split(0),)
HSDP: Layout = (2, 2), (Split(None), Split(0))


@st.composite
def layouts(draw: st.DrawFn, dims: int) -> Layout:
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    places = st.none() | st.integers(0, dims - 1) if dims else st.none()
    splits = [Split(draw(places)) for _ in mesh]
    for m, split in enumerate(splits):
        later = [mesh[n] for n in range(m + 1, len(mesh)) if splits[n].dim == split.dim]
        if split.dim is not None and later and draw(st.booleans()):
            splits[m] = Split(split.dim, math.prod(later))
    return mesh, tuple(splits)


@st.composite
def tensors(draw: st.DrawFn, count: int) -> tuple[tuple[int, ...], tuple[Layout, ...]]:
    shape = tuple(draw(st.lists(st.integers(0, 12), max_size=3)))
    return shape, tuple(draw(layouts(len(shape))) for _ in range(count))


def spreads(shape: tuple[int, ...], layout: Layout) -> list[ShardLayout]:
    """By rank; ranks are numbered backwards, so that their order is not the mesh's."""
    mesh, splits = layout
    ranks = list(reversed(range(math.prod(mesh))))
    places = itertools.product(*map(range, mesh))
    try:
        found = {
            rank: spread_over(shape, mesh, ranks, place, splits) for rank, place in zip(ranks, places, strict=True)
        }
    except ValueError:
        assume(False)  # interleaved shards that are not even
    return [found[rank] for rank in range(len(ranks))]


@hypothesis_settings(max_examples=150)
@given(tensors(1))
def test_boxes_are_those_of_torch(tensor: tuple[tuple[int, ...], tuple[Layout]]) -> None:
    shape, (layout,) = tensor
    mesh, splits = layout
    placements = [
        Replicate() if s.dim is None else Shard(s.dim) if s.after == 1 else _StridedShard(s.dim, split_factor=s.after)
        for s in splits
    ]
    found = spreads(shape, layout)
    assert len({spread.placed for spread in found}) == 1
    for rank, place in zip(reversed(range(len(found))), itertools.product(*map(range, mesh)), strict=True):
        size, start = _compute_local_shape_and_global_offset(shape, mesh, list(place), placements)
        assert found[rank].box.size == tuple(size)
        if 0 not in size:
            assert found[rank].box.start == tuple(start)
        alike = [other for other, spread in enumerate(found) if spread.box == found[rank].box]
        assert set(found[rank].holders) <= set(alike)
        if 0 not in size:
            assert list(found[rank].holders) == alike


@hypothesis_settings(max_examples=150)
@given(tensors(1), st.sampled_from([1, 4, 16]), st.integers(1, 400))
def test_no_chunk_is_in_two_shards(
    tensor: tuple[tuple[int, ...], tuple[Layout]], itemsize: int, chunk_bytes: int
) -> None:
    shape, (layout,) = tensor
    found = spreads(shape, layout)
    try:
        chunk = shard_chunk_shape(found[0], itemsize, chunk_bytes)
    except ValueError:
        return  # refused
    if 0 in shape:
        assert chunk == shape
        return
    assert itemsize * math.prod(chunk) <= max(chunk_bytes, itemsize)
    for spread in found:
        for d, (start, size) in enumerate(zip(spread.box.start, spread.box.size, strict=True)):
            assert start % chunk[d] == 0 or not size
            assert (start + size) % chunk[d] == 0 or start + size == shape[d] or not size


def shares(
    state: dict[str, torch.Tensor], layouts: dict[str, Layout], ranks: int, chunk_bytes: int
) -> tuple[list[RankPlan], list[dict[str, np.ndarray]]]:
    """What each rank writes, and its files' bytes. Tensors without a layout are whole on all ranks."""
    placed = {name: spreads(tuple(state[name].shape), layout) for name, layout in layouts.items()}
    found, files = [], []
    for rank in range(ranks):
        items = []
        for name, tensor in state.items():
            spread = placed[name][rank] if name in placed else None
            part = part_of(tensor, spread.box) if spread else tensor
            items.append(TensorEntry(name, name, part, False, spread))
        share = plan_rank(StateTree(items=items), StateTree(), rank, ranks, chunk_bytes=chunk_bytes, pack_below_bytes=0)
        snapshot, written = Snapshot(share.parts), {}
        for index, part in enumerate(share.parts):
            memory = torch.full((part.nbytes + CRC_BYTES,), 7, dtype=torch.uint8)
            snapshot.copy(index, memory)
            written[part.path] = memory.numpy()
        found.append(share)
        files.append(written)
    return found, files


def read(info: ArrayInfo, name: str, box: Box, files: dict[str, np.ndarray]) -> torch.Tensor:
    out = torch.full(box.size, -1, dtype=info.dtype)
    for place in box.places(info.chunk):
        file = f"{name}/{chunk_name(place)}"
        put_chunk(info, as_tensor(payload(info, files[file], file), info.chunk, info.dtype), place, out, box.start)
    return out


@hypothesis_settings(max_examples=100)
@given(tensors(2), st.integers(1, 200))
@example(((7, 5), (HSDP, FSDP3)), 24)
@example(((6, 41), (((2,), (Split(1),)), FSDP3)), 40)  # padded within rows
def test_shares_tile_a_tensor_and_any_other_layout_reads_it(
    tensor: tuple[tuple[int, ...], tuple[Layout, Layout]], chunk_bytes: int
) -> None:
    shape, (saved, wanted) = tensor
    values = torch.arange(1, math.prod(shape) + 1, dtype=torch.int32).reshape(shape)
    ranks = math.prod(saved[0])
    try:
        written, files = shares({"a": values}, {"a": saved}, ranks, chunk_bytes)
    except CheckpointError:
        return  # refused
    # Once each: no name twice, and as many elements as there are.
    names = Counter(path for each in files for path in each)
    assert set(names.values()) <= {1}
    assert sum(part.contents[0].source.numel() for share in written for part in share.parts) == values.numel()
    documents = [share.documents for share in written if share.documents]
    assert len(documents) == 1
    assert len({share.digest for share in written}) == 1
    assert {share.replicated_bytes for share in written} == {values.nbytes}
    info = parse_node(documents[0]["a/zarr.json"], "a/zarr.json")
    assert isinstance(info, ArrayInfo)
    every = {path: data for each in files for path, data in each.items()}
    assert torch.equal(read(info, "a", Box((0,) * len(shape), shape), every), values)
    for spread in spreads(shape, wanted):
        assert torch.equal(read(info, "a", spread.box, every), part_of(values, spread.box))


@hypothesis_settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=10), st.integers(8, 100))
def test_copies_of_shards_share_the_writing(tensors: list[tuple[int, bool]], chunk_bytes: int) -> None:
    state = {f"{index:02d}": torch.zeros(rows, 3) for index, (rows, _) in enumerate(tensors)}
    sharded = {name: HSDP for name, (_, is_sharded) in zip(state, tensors, strict=True) if is_sharded}
    written, _ = shares(state, sharded, 4, chunk_bytes)
    for shard in (0, 1):  # ranks are numbered backwards
        holders = spreads((2,), HSDP)[shard].holders
        sizes = [
            sum(p.contents[0].source.nbytes for p in written[rank].parts if p.path.split("/")[0] in sharded)
            for rank in holders
        ]
        assert max(sizes) - min(sizes) <= 2 * chunk_bytes
    assert len({share.digest for share in written}) == 1


def test_shards_of_a_prime_number_of_rows_are_cut_across() -> None:
    spread = spreads((4 * 25_153, 4096), ((4,), (Split(0),)))[0]
    chunk = shard_chunk_shape(spread, 4, 32_000_000)
    assert chunk == (25_153, 316)
    vocabulary = spreads((50_257, 768), ((8,), (Split(0),)))[0]
    rows, columns = shard_chunk_shape(vocabulary, 4, 32_000_000)
    assert (rows, columns) == (6283, 768)


def test_shards_that_fit_no_grid_are_refused() -> None:
    spread = spreads((2 * 10_007,), ((2,), (Split(0),)))[0]
    with pytest.raises(ValueError, match=r"chunk_mb of at least 0\.040028"):
        shard_chunk_shape(spread, 4, 10_000)
    assert shard_chunk_shape(spread, 4, 40_028) == (10_007,)
    # Split in two, and each half in two: 5003 + 5002 + 5002 + 5002 rows have no common divisor.
    twice = spreads((20_009,), ((2, 2), (Split(0), Split(0))))[0]
    with pytest.raises(ValueError, match="20009 of them"):
        shard_chunk_shape(twice, 4, 10_000_000)
    item = TensorEntry("w", "model/w", torch.zeros(twice.box.size), False, twice)
    with pytest.raises(CheckpointError, match="'model/w'"):
        plan_rank(StateTree(items=[item]), StateTree(), 0, 4, chunk_bytes=10_000_000, pack_below_bytes=0)


def test_ranks_that_place_a_tensor_differently_disagree() -> None:
    digests = set()
    for layout in (FSDP3, ((3,), (Split(1),)), ((3,), (Split(None),)), None):
        written, _ = shares({"a": torch.zeros(6, 6)}, {} if layout is None else {"a": layout}, 3, 1000)
        digests.add(written[0].digest)
    assert len(digests) == 4


@given(st.integers(1, 5000))
def test_divisors(number: int) -> None:
    assert sorted(divisors(number)) == [n for n in range(1, number + 1) if number % n == 0]
