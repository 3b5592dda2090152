"""Indices as bytes: what goes in comes out, in the size that was promised, and no form is larger than need be."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outlast.comm.compressors import bits as packing
from outlast.comm.compressors.bits import packed_nbytes
from outlast.comm.compressors.indices import Form, decode, decode_rows, encode, form_of, indices_nbytes
from outlast.errors import CommError


@st.composite
def ascending(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Indices and how many there could be; in clusters, too."""
    numel = draw(st.one_of(st.integers(1, 40), st.integers(1, 200_000)))
    k = draw(st.integers(0, min(numel, 400)))
    seed = draw(st.integers(0, 2**31))
    first = draw(st.integers(0, numel - k))
    span = draw(st.sampled_from([k, min(2 * k + 1, numel - first), numel - first]))
    chosen = torch.randperm(max(span, k), generator=torch.Generator().manual_seed(seed))[:k].sort().values
    return chosen + first, numel


def forms(k: int, numel: int) -> list[Form]:
    """Every form, not only the smallest."""
    result = [Form("int32", 4 * k), Form("bitmap", packing.packed_nbytes(numel)), form_of(k, numel)]
    for low in range(20):
        planes = sum(packing.packed_nbytes(k, width) for width in (16, 8, 4, 2, 1) if low & width)
        result.append(Form("delta", planes + packing.packed_nbytes(k + ((numel - 1) >> low)), low))
    return result


@settings(max_examples=60)
@given(ascending())
def test_every_form_gives_back_what_it_was_given(case: tuple[Tensor, int]) -> None:
    indices, numel = case
    k = len(indices)
    for form in forms(k, numel) if 0 < k < numel else [form_of(k, numel)]:
        out = torch.full((form.nbytes,), 0xFF, dtype=torch.uint8)
        encode(indices, numel, out, form)
        expected = torch.arange(numel) if k == numel else indices
        assert torch.equal(decode(out, k, numel, form), expected)
        odd = torch.zeros(form.nbytes + 1, dtype=torch.uint8)[1:]
        encode(indices, numel, odd, form)
        assert torch.equal(odd, out), "no byte is left as it was, and any address will do"


@given(st.integers(1, 2**34), st.floats(0, 1))
def test_the_smallest_form_is_close_to_the_least_there_is(numel: int, share: float) -> None:
    k = min(max(int(numel * share), 1), numel)
    form = form_of(k, numel)
    assert form.nbytes == indices_nbytes(k, numel)
    assert form.nbytes <= math.ceil(numel / 8)
    assert numel > 2**31 or form.nbytes <= 4 * k
    if 0 < k < numel:
        p = k / numel
        entropy = -numel * (p * math.log2(p) + (1 - p) * math.log2(1 - p))
        assert 8 * form.nbytes <= entropy + 2 * k + 64
        # One fewer is the form of another number of indices, not necessarily smaller, but never above its own bound.
        assert indices_nbytes(k - 1, numel) <= form.nbytes + 4


def test_sizes() -> None:
    # 1 % of 10.8 M: 6 low bits, and a bitmap of k + n / 64 bits.
    assert form_of(108_000, 10_800_000) == Form("delta", (108_000 * 6 + 108_000 + 168_749 + 7) // 8, 6)
    assert form_of(1, 1 << 20) == Form("int32", 4)
    assert form_of(100, 1 << 20).kind == "delta"
    assert form_of(500, 1000) == Form("bitmap", 125)
    assert form_of(1000, 1000) == Form("all", 0)
    assert form_of(0, 1000) == Form("all", 0)


@settings(max_examples=40)
@given(ascending(), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**31))
def test_torch_and_numpy_pack_alike(case: tuple[Tensor, int], width: int, seed: int) -> None:
    """Other devices take torch operations alone: the same bytes."""
    count = len(case[0])
    values = torch.randint(0, 1 << width, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    ours, theirs = (torch.full((packing.packed_nbytes(count, width),), 0xFF, dtype=torch.uint8) for _ in range(2))
    packing.pack_small(values, width, ours)
    packing.pack_on_device(values, width, theirs)
    assert torch.equal(ours, theirs)
    assert torch.equal(packing.unpack_small(ours, width, count), values)
    assert torch.equal(packing.unpack_on_device(ours, width, count), values)
    if width == 1:
        bits = torch.zeros_like(ours)
        packing.pack_bits(values.bool(), bits)
        assert torch.equal(bits, ours)
        assert torch.equal(packing.unpack_bits(ours, count), values.bool())


def test_damage_is_found_where_the_number_of_indices_shows_it() -> None:
    indices = torch.arange(0, 5000, 50)
    out = torch.zeros(indices_nbytes(100, 5000), dtype=torch.uint8)
    encode(indices, 5000, out)
    out[-1] = 0xFF
    with pytest.raises(CommError, match="expected 100"):
        decode(out, 100, 5000)


def test_damage_of_one_row_of_many_is_found_even_where_another_makes_up_for_it() -> None:
    rows = torch.zeros((3, indices_nbytes(100, 5000)), dtype=torch.uint8)
    for row in rows:
        encode(torch.arange(0, 5000, 50), 5000, row)
    assert torch.equal(decode_rows(rows, 100, 5000), torch.arange(0, 5000, 50).expand(3, 100))
    low, planes = form_of(100, 5000).low, rows.shape[1] - packed_nbytes(100 + (4999 >> form_of(100, 5000).low))
    assert low
    lost = int(rows[1, planes]) & -int(rows[1, planes])
    rows[1, planes] -= lost
    gained = next(bit for bit in (1, 2, 4, 8, 16) if not int(rows[2, planes]) & bit)
    rows[2, planes] += gained
    with pytest.raises(CommError, match="marks 99 indices, expected 100"):
        decode_rows(rows, 100, 5000)


def test_more_entries_than_an_int32_counts() -> None:
    numel = 2**33
    indices = torch.tensor([0, 5, 2**31 + 3, 2**32 + 1, numel - 1])
    form = form_of(5, numel)
    assert form.kind == "delta"
    out = torch.zeros(form.nbytes, dtype=torch.uint8)
    encode(indices, numel, out)
    assert torch.equal(decode(out, 5, numel), indices)
    assert indices_nbytes(5, numel) < 5 * 8
