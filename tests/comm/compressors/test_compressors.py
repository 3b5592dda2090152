"""Compressors: the contraction they promise, always the k largest, always the bytes they promise."""

from __future__ import annotations

import math
from typing import Any, Literal

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outlast.comm.compressors import (
    COMPRESSORS,
    VALUES,
    BlockTopK,
    Compressor,
    Dense,
    Gear,
    Int4,
    Int8,
    LowRank,
    Natural,
    RandK,
    Sign,
    Sum,
    TopK,
    make_compressor,
)
from outlast.comm.compressors import select as select_module
from outlast.comm.compressors.select import select, select_in_blocks, select_on_device
from outlast.errors import CommError, OutOfRange, UnknownCompressor

"""The same examples in every run, however slow the machine."""
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-40, 1e-38, 3e38, -3e38, 1e37, 65504.0]
OVERFLOW = 1.5 * 2.0**127
"""From here on a codec that rounds says that it overflowed."""


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """One to three dimensions, float32, float64, float16 or bfloat16, anything a float can be but NaN and Inf."""
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    width: Literal[32, 64] = 32 if dtype == np.float32 else 64
    values = st.one_of(
        st.sampled_from(SPECIAL), st.floats(allow_nan=False, allow_infinity=False, width=width), st.integers(-2, 2)
    )
    shape = st.one_of(
        st.integers(1, 300).map(lambda n: (n,)), arrays.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=12)
    )
    x = torch.from_numpy(draw(arrays.arrays(dtype, shape, elements=values.map(dtype))))
    if dtype == np.float64:
        return x
    kind = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    limit = torch.finfo(kind).max
    return x.clamp(-limit, limit).to(kind)


values = st.sampled_from(VALUES)
densities = st.floats(0.001, 1)
selections = st.sampled_from(["auto", "exact", "sampled"])
simple = st.one_of(
    st.builds(Dense),
    st.builds(TopK, densities, selection=selections, values=values),
    st.integers(1, 400).map(lambda k: TopK(k=k)),
    st.builds(BlockTopK, densities, block=st.one_of(st.none(), st.integers(1, 70)), values=values),
    st.builds(Int8, st.integers(1, 300)),
    st.builds(Int4, st.integers(1, 100)),
    st.builds(Sign, st.one_of(st.none(), st.integers(1, 100))),
    st.builds(Natural),
    st.builds(LowRank, st.integers(1, 5), values=st.sampled_from([v for v in VALUES if v != "sign"])),
)
compressors = st.one_of(
    simple,
    st.lists(simple, min_size=1, max_size=3).map(lambda parts: Sum(*parts)),
    st.builds(Gear, densities, st.integers(1, 3), bits=st.sampled_from([4, 8])),
)


def applied(compressor: Compressor, x: Tensor) -> Tensor:
    message = compressor.compress(x)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.zeros(x.shape, dtype=dtype)
    compressor.add_to(out, message.payload.clone())
    mine = torch.zeros_like(out)
    message.add_to(mine)
    assert torch.equal(out.nan_to_num(7.0), mine.nan_to_num(7.0)), "the sender's message is what the receiver opens"
    return out


def relative_error(sent: Tensor, x: Tensor) -> tuple[float, float]:
    """||C(x) - x|| / ||x|| and what rounding to x's type may add to it; scaled, so that squares of huge entries stay
    numbers."""
    x, smallest = x.double(), 2.0**-149 if sent.dtype == torch.float32 else 2.0**-1074
    scale = float(x.abs().max()) or 1.0
    norm = float((x / scale).norm())
    error = float(((sent.double() - x) / scale).norm())
    return error / (norm or 1.0), 1e-6 + math.sqrt(x.numel()) * (smallest / scale) / (norm or 1.0)


@settings(max_examples=150)
@given(compressors, tensors())
def test_contraction_and_size(compressor: Compressor, x: Tensor) -> None:
    shape = tuple(x.shape)
    message = compressor.compress(x)
    assert message.payload.dtype == torch.uint8
    assert message.payload.numel() == compressor.nbytes(shape, x.dtype)
    alpha = compressor.alpha(shape)
    assert 0 < alpha <= 1
    sent = applied(compressor, x)
    largest = float(x.abs().max())
    if not message.finite():
        assert largest >= (OVERFLOW if x.dtype != torch.float64 else 2.0**1020), "finite, and far from overflow"
        return
    error, rounding = relative_error(sent, x)
    assert error <= math.sqrt(1 - alpha) + rounding


@settings(max_examples=60)
@given(compressors, st.integers(1, 700), st.integers(1, 5), st.sampled_from([0, -140, 120]), st.integers(0, 2**31))
def test_all_ranks_payloads_opened_at_once_are_each_opened_alone(
    compressor: Compressor, numel: int, ranks: int, power: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(numel, generator=generator) * 2.0**power for _ in range(ranks)]
    tensors[0][::2] = -0.0
    payloads = [compressor.compress(x).payload for x in tensors]
    for payload, message in zip(payloads, compressor.open_all(payloads, (numel,)), strict=True):
        alone, together = torch.full((2, numel), -0.0)
        compressor.open(payload, (numel,)).add_to(alone)
        message.add_to(together)
        assert alone.view(torch.int32).equal(together.view(torch.int32))
        assert message.finite()


@settings(max_examples=40)
@given(densities, values, tensors())
def test_random_entries_come_from_the_tensor(density: float, values: str, x: Tensor) -> None:
    compressor = RandK(density, values=values)
    memory = compressor.new_memory(tuple(x.shape), x.dtype, x.device)
    for _ in range(2):
        message = compressor.compress(x, None, memory)
        assert message.payload.numel() == compressor.nbytes(tuple(x.shape), x.dtype)
        if values != "fp32":
            continue
        sent = torch.zeros(x.shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        message.add_to(sent)
        drawn = sent != 0
        assert torch.equal(sent[drawn], x.to(sent.dtype)[drawn])
        assert int(drawn.sum()) <= compressor.count(x.numel())


@given(tensors(), st.data())
def test_always_the_k_largest_and_of_equal_ones_the_first(x: Tensor, data: st.DataObject) -> None:
    x = x.reshape(-1)
    x = x if x.dtype == torch.float64 else x.float()
    k = data.draw(st.integers(1, x.numel()))
    order = sorted(range(x.numel()), key=lambda i: (-abs(float(x[i])), i))
    expected = sorted(order[:k])
    for selection in ("auto", "exact", "sampled"):
        assert select(x, k, selection).tolist() == expected
    if k < x.numel():
        assert select_on_device(x, k).tolist() == expected
    block = data.draw(st.integers(1, x.numel()))
    most = min(k, block)
    in_blocks: list[int] = []
    for start in range(0, x.numel(), block):
        stop = min(start + block, x.numel())
        ranked = sorted(range(start, stop), key=lambda i: (-abs(float(x[i])), i))
        in_blocks += sorted(ranked[: min(most, stop - start)])
    assert select_in_blocks(x, most, block).tolist() == in_blocks


LARGE: dict[str, Any] = {
    "normal": lambda n, g: torch.randn(n, generator=g),
    "heavy tail": lambda n, g: torch.randn(n, generator=g) / torch.rand(n, generator=g).clamp_min(1e-6),
    "columns": lambda n, g: torch.randn(n, generator=g) * (torch.arange(n) % 64 == 5),
    "one block": lambda n, g: torch.randn(n, generator=g) * (torch.arange(n) < n // 50),
    "ties": lambda n, g: torch.randint(-3, 4, (n,), generator=g).float(),
    "all equal": lambda n, g: torch.full((n,), -2.0),
    "zeros": lambda n, g: torch.zeros(n),
    "few": lambda n, g: torch.zeros(n).index_fill_(0, torch.tensor([0, 65_534, 65_535, n - 1]), -1e-30),
}


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("numel", [65_536, 65_537, 300_003])
@pytest.mark.parametrize("density", [0.0001, 0.01, 0.3, 0.9])
def test_sampling_never_changes_the_result(
    kind: str, numel: int, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if numel > 100_000:
        monkeypatch.setattr(select_module, "CHUNK", 70_000)  # several pieces
    x = LARGE[kind](numel, torch.Generator().manual_seed(numel))
    k = TopK(density).count(numel)
    exact = select(x, k, "exact")
    assert exact.numel() == k
    assert torch.equal(select(x, k, "sampled"), exact)
    assert torch.equal(select(x, k, "auto"), exact)
    assert torch.equal(x[exact].abs().sort().values, x.abs().topk(k).values.sort().values)
    assert torch.equal(applied(TopK(density), x), torch.zeros(numel).index_copy_(0, exact, x[exact]))


@pytest.mark.parametrize("name", [name for name in COMPRESSORS if name not in ("randk", "lowrank")])
def test_tensors_of_several_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work on large tensors is done in pieces; none is lost, doubled or mixed up with another."""
    monkeypatch.setattr(select_module, "CHUNK", 70_000)
    compressor = make_compressor(name, density=0.02, rank=1)
    x = torch.randn(3, 200_001, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1.0], [8.0], [0.1]])
    error, rounding = relative_error(applied(compressor, x), x)
    assert error <= math.sqrt(1 - compressor.alpha(tuple(x.shape))) + rounding
    if name in ("int8", "int4", "natural"):
        for row in range(3):
            assert relative_error(applied(compressor, x)[row], x[row])[0] < {"int8": 0.02, "int4": 0.15}.get(name, 0.3)


@settings(max_examples=30)
@given(
    st.integers(1, 100_000),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.sampled_from([TopK(0.001, selection="exact"), TopK(0.001, selection="sampled"), Dense()]),
    st.data(),
)
def test_a_number_that_is_none_is_always_sent(
    numel: int, value: float, compressor: Compressor, data: st.DataObject
) -> None:
    x = torch.full((numel,), 3e38)
    x[data.draw(st.integers(0, numel - 1))] = value
    for dtype in (torch.float32, torch.float64):
        assert not compressor.compress(x.to(dtype)).finite()


def test_a_sum_that_overflows_is_no_false_alarm() -> None:
    assert Dense().compress(torch.full((1000,), 3e38)).finite()


def test_what_a_code_cannot_write_counts_as_overflow() -> None:
    x = torch.ones(100)
    x[7] = 3e38
    assert TopK(0.5).compress(x).finite()
    for compressor in (Int8(), Int4(), Sign(), Natural(), TopK(0.5, values="bf16"), TopK(0.5, values="int8")):
        message = compressor.compress(x)
        assert not message.finite()
        out = torch.zeros(100)
        message.add_to(out)
        assert out.isnan().any()


@pytest.mark.parametrize("values", VALUES)
def test_what_rounding_costs_adds_to_what_selection_costs(values: str) -> None:
    """||x - Q(T(x))||^2 = ||x - T(x)||^2 + ||T(x) - Q(T(x))||^2."""
    x = torch.randn(50, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    selected, sent = applied(TopK(0.1), x), applied(TopK(0.1, values=values), x)
    whole, selection, rounding = ((a - b).square().sum() for a, b in ((x, sent), (x, selected), (selected, sent)))
    torch.testing.assert_close(whole, selection + rounding)
    code = TopK(k=300, values=values).alpha((300,))
    assert rounding <= (1 - code) * selected.square().sum() * (1 + 1e-9)


def test_sizes_in_bytes() -> None:
    top = TopK(0.01)
    # 100 values of 4 bytes; indices: 6 low bits, and a bitmap of 100 + 9999 / 64 bits.
    assert top.nbytes((10_000,)) == 400 + 112
    assert top.nbytes((100, 100)) == top.nbytes((10_000,))
    assert top.nbytes((10_000,), torch.float64) == 800 + 112
    assert top.nbytes((10_000,), torch.bfloat16) == top.nbytes((10_000,))
    assert TopK(0.01, values="int8").nbytes((10_000,)) == 8 + 104 + 112
    assert TopK(0.01, values="int4").nbytes((10_000,)) == 8 + 64 + 112
    assert TopK(0.01, values="sign").nbytes((10_000,)) == 8 + 24 + 112
    assert TopK(0.01, values="bf16").nbytes((10_000,)) == 8 + 200 + 112
    assert top.nbytes((1,)) == 8
    assert TopK(1.0).nbytes((1000,)) == 4000 == Dense().nbytes((1000,))
    assert TopK(0.07).count(100) == 7
    assert TopK(k=5).count(3) == 3
    assert TopK(k=5).alpha((10,)) == 0.5
    assert BlockTopK(0.01).nbytes((10_000,)) == top.nbytes((10_000,))
    assert BlockTopK(0.01, block=256).count(10_000) == 39 * 3 + 3
    assert BlockTopK(0.03).block == 33
    assert RandK(0.01).nbytes((10_000,)) == 8 + 400
    assert Int8().nbytes((10_000,)) == 8 + 10_000 + 80
    assert Int4().nbytes((10_000,)) == 8 + 5632
    assert Sign().nbytes((10_000,)) == 8 + 1256
    assert Natural().nbytes((10_000,)) == 8 + 11_256
    assert LowRank(4).nbytes((100, 50)) == 8 + 4 * 4 * 150
    assert LowRank(4, values="bf16").nbytes((100, 50)) == 8 + 16 + 2 * 4 * 150
    assert LowRank(4).nbytes((100,)) == 400
    assert LowRank(40).nbytes((50, 50)) == 10_000
    assert Gear(0.01, 4).nbytes((100, 50)) == sum(part.nbytes((100, 50)) for part in (TopK(0.01), Int4(), LowRank(4)))
    for name in COMPRESSORS:
        assert make_compressor(name).name == name
        assert make_compressor(name).nbytes((0, 5)) == 0


def test_alphas() -> None:
    shape = (64, 64)
    assert Int8().alpha(shape) == pytest.approx(0.99600, abs=1e-4)
    assert Int4().alpha(shape) == pytest.approx(0.8570, abs=1e-3)
    assert Sign().alpha(shape) == 1 / 4096
    assert Sign(128).alpha(shape) == 1 / 128
    assert Natural().alpha(shape) == 8 / 9
    assert RandK(0.25).alpha(shape) == 0.25
    assert BlockTopK(0.05).alpha(shape) == 0.05
    assert LowRank(4).alpha(shape) == 1 / 16
    assert LowRank(4).alpha((64, 1)) == 1
    assert TopK(0.25, values="natural").alpha(shape) == pytest.approx(0.25 * 8 / 9)
    assert Sum(TopK(0.25), RandK(0.5)).alpha(shape) == pytest.approx(1 - 0.75 * 0.5)


def test_names_and_settings_that_are_refused() -> None:
    for make in (
        lambda: TopK(),
        lambda: TopK(0.1, k=3),
        lambda: TopK(0.0),
        lambda: TopK(1.5),
        lambda: TopK(k=0),
        lambda: TopK(0.1, selection="exakt"),
        lambda: TopK(0.1, values="int7"),
        lambda: BlockTopK(0.1, block=0),
        lambda: RandK(0),
        lambda: Int8(0),
        lambda: Sign(-1),
        lambda: LowRank(0),
        lambda: LowRank(2, values="sign"),
        lambda: Gear(bits=5),
        lambda: Sum(),
    ):
        with pytest.raises(OutOfRange):
            make()
    with pytest.raises(UnknownCompressor, match="topk"):
        make_compressor("topc")


def test_what_cannot_be_compressed_is_said() -> None:
    with pytest.raises(CommError, match="int32"):
        TopK(0.1).compress(torch.zeros(10, dtype=torch.int32))
    with pytest.raises(CommError, match="expected 16 bytes"):
        TopK(k=1).open(torch.zeros(8, dtype=torch.uint8), (10,), torch.float32)
