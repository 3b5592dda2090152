"""What the GPU kernels must give: the CPU's bits. Run by test_kernels.py, in a process of its own: when it is imported,
Triton decides whether kernels are interpreted (TRITON_INTERPRET=1; tensors in the host's memory) or compiled."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from outlast.comm import kernels
from outlast.comm.compressors import select
from outlast.comm.compressors.bits import pack_bits
from outlast.comm.compressors.blockwise import Blocks
from outlast.comm.compressors.power_scale import HEADER_BYTES
from outlast.comm.compressors.signs import Signs
from outlast.comm.kernels import blockwise, signs, sparse
from outlast.errors import CommError

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
KINDS = ("normal", "ties", "equal", "zero", "denormal", "wide", "nan", "inf", "signed zeros")

few = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
sizes = st.one_of(st.integers(1, 70), st.integers(71, 5000))
kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 2**16)


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several programs and several pieces of each, of few entries. The interpreter computes with numpy, which warns of
    NaN and overflow where a GPU does not."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(sparse, "BLOCK", 1024)
        monkeypatch.setattr(sparse, "PROGRAMS", 2)
        monkeypatch.setattr(sparse, "SAMPLE", 500)
        monkeypatch.setattr(blockwise, "TILE", 1024)
        monkeypatch.setattr(signs, "TILE", 1024)
    with np.errstate(all="ignore"):
        yield


def entries(kind: str, numel: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=random)
    some = torch.rand(numel, generator=random) < 0.1
    if kind == "ties":
        return (x * 2).round()
    if kind == "equal":
        return torch.full((numel,), -1.5)
    if kind == "zero":
        return torch.zeros(numel)
    if kind == "denormal":
        return x * 2.0**-140
    if kind == "wide":
        return x * torch.exp2(torch.randint(-100, 90, (numel,), generator=random).float())
    if kind == "nan":
        return x.masked_fill(some, math.nan)
    if kind == "inf":
        return x.masked_fill(some, -math.inf)
    if kind == "signed zeros":
        return x.masked_fill(some, 0.0).masked_fill(x < 0, -0.0)
    return x


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Bit for bit, and in type and shape."""
    ours, theirs = ours.cpu(), theirs.cpu()
    if ours.dtype == torch.float32:
        ours, theirs = ours.view(torch.int32), theirs.view(torch.int32)
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def with_one_nan(x: Tensor) -> Tensor:
    """NaNs that arithmetic makes differ in sign and payload from processor to processor."""
    return x.cpu().masked_fill(x.cpu().isnan(), math.nan)


@few
@given(numel=sizes, share=st.floats(0, 1), kind=kinds, seed=seeds, selection=st.sampled_from(("exact", "sampled")))
@example(numel=5000, share=0.01, kind="ties", seed=1, selection="sampled")
@example(numel=5000, share=0.01, kind="zero", seed=1, selection="sampled")
@example(numel=4097, share=0.3, kind="equal", seed=1, selection="exact")
@example(numel=1, share=1.0, kind="nan", seed=0, selection="auto")
@example(numel=3000, share=0.0, kind="nan", seed=0, selection="sampled")
@example(numel=3000, share=0.04, kind="wide", seed=0, selection="sampled")
@example(numel=3000, share=1.0, kind="inf", seed=0, selection="sampled")
def test_select(numel: int, share: float, kind: str, seed: int, selection: str) -> None:
    x, k = entries(kind, numel, seed), max(1, round(share * numel))
    expected = select.select(x, k, "exact")
    held = x.to(DEVICE, copy=True)
    indices, values = kernels.select(held, k, selection)
    assert same(indices, expected)
    assert same(values, x[expected])
    assert same(held, x)
    again, _ = kernels.select(held, k, selection, take=True)
    assert same(again, expected)
    rest = x.clone().index_add_(0, expected, x[expected], alpha=-1.0)
    assert same(with_one_nan(held), with_one_nan(rest))


@few
@given(
    numel=sizes,
    kind=st.sampled_from([kind for kind in KINDS if kind not in ("nan", "inf")]),
    seed=seeds,
    selection=st.sampled_from(("exact", "sampled")),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
)
@example(numel=4999, kind="normal", seed=3, selection="sampled", dtype=torch.float32)
@example(numel=4999, kind="normal", seed=3, selection="sampled", dtype=torch.bfloat16)
@example(numel=4999, kind="denormal", seed=3, selection="sampled", dtype=torch.float32)
def test_select_of_a_sum(numel: int, kind: str, seed: int, selection: str, dtype: torch.dtype) -> None:
    e, g = entries(kind, numel, seed), entries("normal", numel, seed + 1).to(dtype)
    if kind == "denormal":
        g = (g.float() * 2.0**-140).to(dtype)
    k = max(1, numel // 50)
    held = e.to(DEVICE, copy=True)
    e.add_(g)
    expected = select.select(e, k, "exact")
    indices, values = kernels.select(held, k, selection, plus=g.to(DEVICE), take=True)
    assert same(indices, expected)
    assert same(values, e[expected])
    assert same(held, e.index_add_(0, expected, e[expected], alpha=-1.0))


def test_an_estimate_that_is_too_high_selects_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entries that the sample sees are the largest ones, so fewer than k are above the estimate."""
    monkeypatch.setattr(sparse, "_rank", lambda count, k, numel: 1)
    x = entries("normal", 3000, 5)
    held = x.to(DEVICE, copy=True)
    g = entries("normal", 3000, 6)
    indices, _ = kernels.select(held, 100, "sampled", plus=g.to(DEVICE))
    assert same(indices, select.select(x + g, 100, "exact"))
    assert same(held, x + g)


@few
@given(numel=sizes, block=st.integers(1, 300), kind=kinds, seed=seeds)
@example(numel=4097, block=64, kind="equal", seed=0)
@example(numel=100, block=200, kind="nan", seed=0)
def test_largest_in_blocks(numel: int, block: int, kind: str, seed: int) -> None:
    x = entries(kind, numel, seed)
    assert same(kernels.largest_in_blocks(x.to(DEVICE), block), select.select_in_blocks(x, 1, block))


@few
@given(numel=sizes, ranks=st.integers(1, 3), scale=st.sampled_from((1.0, -1.0, 1 / 3, 0.1)), kind=kinds, seed=seeds)
@example(numel=5000, ranks=3, scale=1 / 3, kind="denormal", seed=0)
def test_sums_of_ranks(numel: int, ranks: int, scale: float, kind: str, seed: int) -> None:
    out = entries("denormal" if kind == "denormal" else "normal", numel, seed)
    held = out.to(DEVICE, copy=True)
    for rank in range(ranks):
        x = entries(kind, numel, seed + rank + 1)
        indices = select.select(x, -(-numel // 2), "exact")
        values = x[indices]
        out.index_add_(0, indices, values, alpha=scale)
        kernels.add_sparse(held, indices.to(DEVICE), values.to(DEVICE), scale)
    assert same(with_one_nan(held), with_one_nan(out))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="compiled code stops at it: an assertion on the device")
def test_an_index_outside_touches_no_other_memory() -> None:
    held = torch.zeros(9)
    kernels.add_sparse(held[2:7], torch.tensor([-1, 1, 5]), torch.ones(3))
    assert held.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0]


@few
@given(
    numel=sizes,
    bits=st.sampled_from((4, 8)),
    block=st.integers(1, 400),
    kind=st.sampled_from(("normal", "ties", "equal", "zero", "signed zeros", "spread", "halves")),
    seed=seeds,
    scale=st.sampled_from((1.0, -1.0, 1 / 3)),
)
@example(numel=5000, bits=8, block=256, kind="normal", seed=0, scale=1 / 3)
@example(numel=5001, bits=4, block=32, kind="spread", seed=0, scale=1 / 3)
@example(numel=4999, bits=4, block=31, kind="normal", seed=0, scale=-1.0)
@example(numel=333, bits=4, block=33, kind="normal", seed=0, scale=1.0)
@example(numel=3, bits=4, block=400, kind="halves", seed=0, scale=1.0)
@example(numel=2500, bits=8, block=2100, kind="halves", seed=0, scale=1.0)
def test_blocks(numel: int, bits: int, block: int, kind: str, seed: int, scale: float) -> None:
    """``spread`` has blocks that do not count against others; ``halves`` lie between two multiples of the unit."""
    if kind == "spread":
        x = entries("normal", numel, seed)
        x *= torch.exp2(-((torch.arange(numel) // block) * 37 % 160).float())
    elif kind == "halves":
        x = ((entries("normal", numel, seed) * 2).round() + 0.5).clamp(-6.5, 6.5)
        x[::block] = 2 ** (bits - 1) - 1
    else:
        x = entries(kind, numel, seed)
    code = Blocks(bits, block)
    payload = torch.zeros(code.nbytes(numel, torch.float32), dtype=torch.uint8)
    code.write(x, payload)
    assert int(payload[:4].view(torch.int32)) == 0
    if kernels.fits_blocks(bits, block):
        ours = torch.zeros_like(payload, device=DEVICE)
        maxima = kernels.quantise_blocks(x.to(DEVICE), bits, block, ours[HEADER_BYTES:])
        assert same(ours, payload)
        assert same(maxima, code._maxima(x).abs())
    else:
        assert bits == 4
        assert block % 2
    out = entries("normal", numel, seed + 1)
    held = out.to(DEVICE, copy=True)
    code.add_to(payload, out, scale)
    kernels.add_blocks(payload[HEADER_BYTES:].to(DEVICE), held, bits, block, scale)
    assert same(held, out)


@few
@given(
    numel=sizes,
    kind=st.sampled_from([kind for kind in KINDS if kind not in ("nan", "inf")]),
    seed=seeds,
    scale=st.sampled_from((1.0, -1.0, 1 / 3)),
)
@example(numel=4097, kind="signed zeros", seed=0, scale=1 / 3)
@example(numel=8, kind="denormal", seed=0, scale=1.0)
def test_signs(numel: int, kind: str, seed: int, scale: float) -> None:
    x = entries(kind, numel, seed)
    sums, largest = kernels.absolute_sums(x.to(DEVICE))
    assert same(largest, x.abs().max())
    assert float(sums.double().sum()) == pytest.approx(float(x.double().abs().sum()), rel=1e-6, abs=1e-44)
    again, _ = kernels.absolute_sums(x.to(DEVICE))
    assert same(sums, again)
    expected = torch.zeros(-(-numel // 8), dtype=torch.uint8)
    pack_bits(x.view(torch.int32) < 0, expected)
    room = torch.full((len(expected) + 16,), 0xA5, dtype=torch.uint8, device=DEVICE)
    packed = room[8 : 8 + len(expected)]
    kernels.pack_signs(x.to(DEVICE), packed)
    assert same(packed, expected)
    assert bool((room[:8] == 0xA5).all())
    assert bool((room[8 + len(expected) :] == 0xA5).all())
    code, mean, out = Signs(), torch.tensor([0.37]), entries("normal", numel, seed + 1)
    held = out.to(DEVICE, copy=True)
    code._add(torch.cat((mean.view(torch.uint8), expected)), out, scale)
    kernels.add_signs(packed, mean.to(DEVICE), held, scale)
    assert same(held, out)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_the_largest(value: float) -> None:
    x = entries("normal", 3000, 0)
    x[1234] = value
    assert not bool(torch.isfinite(kernels.absolute_sums(x.to(DEVICE))[1]))


@few
@given(numel=sizes, kind=st.sampled_from(("nan", "inf", "denormal", "wide")), seed=seeds)
def test_maxima_tell_what_is_out_of_range(numel: int, kind: str, seed: int) -> None:
    x = entries(kind, numel, seed)
    body = torch.zeros(Blocks(8, 64)._body_bytes(numel) + 1, dtype=torch.uint8, device=DEVICE)
    maxima = kernels.quantise_blocks(x.to(DEVICE), 8, 64, body)
    assert same(with_one_nan(maxima), with_one_nan(Blocks(8, 64)._maxima(x).abs()))
    assert body[-1] == 0


def test_other_tensors_are_refused() -> None:
    x = torch.ones(8, device=DEVICE)
    body = torch.empty(64, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(CommError, match="k = 9 of 8"):
        kernels.select(x, 9)
    with pytest.raises(CommError, match="plus"):
        kernels.select(x, 1, plus=x[:4])
    with pytest.raises(CommError, match="float64"):
        kernels.select(x, 1, plus=x.double())
    with pytest.raises(CommError, match="float64"):
        kernels.select(x.double(), 1)
    with pytest.raises(CommError, match="not contiguous"):
        kernels.add_blocks(body, x[::2], 8, 4)
    with pytest.raises(CommError, match="index"):
        kernels.add_sparse(x, torch.zeros(1, dtype=torch.int32, device=DEVICE), x[:1])
    with pytest.raises(CommError, match="fits_blocks"):
        kernels.quantise_blocks(x, 4, 3, body)
    with pytest.raises(CommError, match="expected at least 10 bytes"):
        kernels.quantise_blocks(x, 8, 8, body[:9])
    with pytest.raises(CommError, match="block = 0"):
        kernels.largest_in_blocks(x, 0)
