# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: N803
"""Code that Triton compiles. Importing this module imports Triton.

``numel`` is the number of entries, ``BLOCK`` how many of them one program handles at a time; positions are int32.
A magnitude is |x| as the integer that its bits are: ordered as the numbers, Inf above them, NaN above Inf.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _magnitude(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def sample(x, plus, out, stride, count, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """Magnitudes of ``count`` entries of x (of x + plus), one of each ``stride``, scattered by a fixed hash: equally
    spaced ones would all be in a few columns of a matrix."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    place = i * stride + (((i * 1640531527) & 0x7FFFFFFF) >> 7) % stride
    value = tl.load(x + place, mask=inside, other=0.0)
    if ADD:
        value += tl.load(plus + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i, _magnitude(value), mask=inside)


@triton.jit
def add_and_count(x, plus, threshold, counts, numel, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """x += plus; and of each block how many magnitudes are the threshold or more."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    value = tl.load(x + at, mask=inside, other=0.0)
    if ADD:
        value += tl.load(plus + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + at, value, mask=inside)
    hit = inside & (_magnitude(value) >= tl.load(threshold))
    tl.store(counts + block, tl.sum(hit.to(tl.int32), axis=0))


@triton.jit
def candidates(x, threshold, starts, places, values, numel, BLOCK: tl.constexpr):
    """Places and values, in order, of the magnitudes that are the threshold or more; a block's begin at its start."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    value = tl.load(x + at, mask=inside, other=0.0)
    hit = inside & (_magnitude(value) >= tl.load(threshold))
    to = tl.load(starts + block) + tl.cumsum(hit.to(tl.int32), axis=0) - 1
    tl.store(places + to, at, mask=hit)
    tl.store(values + to, value, mask=hit)


@triton.jit
def histogram(values, state, bins, numel, pieces, SHIFT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Adds to bins how often each digit of WIDTH bits from SHIFT up occurs, among the magnitudes whose higher bits are
    those of state[0]. A program goes through ``pieces`` blocks before it writes."""
    found = tl.zeros([1 << WIDTH], dtype=tl.int32)
    prefix = tl.load(state) >> SHIFT >> WIDTH
    first = tl.program_id(0) * pieces
    for piece in range(pieces):
        at = (first + piece) * BLOCK + tl.arange(0, BLOCK)
        inside = at < numel
        bits = _magnitude(tl.load(values + at, mask=inside, other=0.0))
        ours = inside & ((bits >> SHIFT >> WIDTH) == prefix)
        found += tl.histogram((bits >> SHIFT) & ((1 << WIDTH) - 1), 1 << WIDTH, mask=ours)
    tl.atomic_add(bins + tl.arange(0, 1 << WIDTH), found, mask=found > 0)


@triton.jit
def descend(bins, state, k, FIRST: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    """One digit more of the k-th largest magnitude, state[0], and its rank among those that share the digits so far,
    state[1]. Leaves bins zero."""
    digits = tl.arange(0, 1 << WIDTH)
    count = tl.load(bins + digits)
    at_least = tl.cumsum(count, axis=0, reverse=True)
    rank = k if FIRST else tl.load(state + 1)
    digit = tl.sum((at_least >= rank).to(tl.int32), axis=0) - 1
    above = tl.sum(tl.where(digits > digit, count, 0), axis=0)
    tl.store(bins + digits, tl.zeros([1 << WIDTH], dtype=tl.int32))
    tl.store(state, tl.load(state) | (digit << SHIFT))
    tl.store(state + 1, rank - above)


@triton.jit
def count_kept(values, state, counts, blocks, numel, BLOCK: tl.constexpr):
    """Of each block how many magnitudes are above the k-th, and, ``blocks`` further on, how many equal it."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    bits = _magnitude(tl.load(values + at, mask=inside, other=0.0))
    kth = tl.load(state)
    tl.store(counts + block, tl.sum((inside & (bits > kth)).to(tl.int32), axis=0))
    tl.store(counts + blocks + block, tl.sum((inside & (bits == kth)).to(tl.int32), axis=0))


@triton.jit
def keep(
    values, places, state, before, indices, kept, x, blocks, numel,
    MAPPED: tl.constexpr, TAKE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes indices and values, in order, of all magnitudes above the k-th and of the first state[1] equal to it.

    ``before`` holds the counts of :func:`count_kept` of all blocks before each. MAPPED: the index of an entry is what
    ``places`` says. TAKE: subtracts the values from x.
    """
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    value = tl.load(values + at, mask=inside, other=0.0)
    bits = _magnitude(value)
    kth = tl.load(state)
    quota = tl.load(state + 1)
    ties_before = tl.load(before + blocks + block)
    tie = inside & (bits == kth)
    chosen = (inside & (bits > kth)) | (tie & (ties_before + tl.cumsum(tie.to(tl.int32), axis=0) <= quota))
    start = tl.load(before + block) + tl.minimum(ties_before, quota)
    to = start + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    index = tl.load(places + at, mask=chosen, other=0) if MAPPED else at
    tl.store(indices + to, index.to(tl.int64), mask=chosen)
    tl.store(kept + to, value, mask=chosen)
    if TAKE:
        tl.store(x + index, value - value, mask=chosen)


@triton.jit
def largest_in_blocks(x, places, numel, block, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Of each row of ``block`` entries the place of the largest magnitude, of equal ones the first."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDE)[None, :]
    at = row[:, None] * block + column
    inside = (column < block) & (at < numel)
    bits = _magnitude(tl.load(x + at, mask=inside, other=0.0))
    # The magnitude above, and below it a number that falls with the column; outside, below all of these.
    key = tl.where(inside, (bits.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64), -1)
    best = 0x7FFFFFFF - (tl.max(key, axis=1) & 0x7FFFFFFF)
    start = row * block
    tl.store(places + row, start.to(tl.int64) + best, mask=start < numel)


@triton.jit(debug=True)
def add_sparse(out, indices, values, scale, count, numel, BLOCK: tl.constexpr):
    """out[indices] += scale * values; no index twice."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    place = tl.load(indices + at, mask=inside, other=0)
    ours = inside & (place >= 0) & (place < numel)
    tl.device_assert(ours | (at >= count), "index out of range")
    value = tl.load(values + at, mask=inside, other=0.0)
    tl.store(out + place, tl.load(out + place, mask=ours, other=0.0) + value * scale, mask=ours)


@triton.jit
def quantise_blocks(
    x, units, packed, maxima, numel, block,
    LEVELS: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of each row of ``block`` entries the largest magnitude, the unit, and the entries in units."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = row * block
    column = tl.arange(0, WIDE)[None, :]
    at = start[:, None] + column
    inside = (column < block) & (at < numel)
    value = tl.load(x + at, mask=inside, other=0.0)
    largest = tl.max(_magnitude(value), axis=1).to(tl.float32, bitcast=True)
    tl.store(maxima + row, largest, mask=start < numel)
    quotient = tl.math.div_rn(largest, tl.full([ROWS], LEVELS, tl.float32)).to(tl.int32, bitcast=True)
    # Some releases divide to 0 where the quotient is below the smallest normal number, 2^-126. There the bits of a
    # number are how many times 2^-149 it is, and no quotient lies halfway between two, for LEVELS is odd.
    small = largest < LEVELS * 1.1754943508222875e-38
    times = (tl.where(small, largest, 0.0) * 1.2676506002282294e30 * 562949953421312.0).to(tl.int32)
    unit = tl.where(small, (times + LEVELS // 2) // LEVELS, quotient) + 0xFFFF >> 16
    tl.store(units + row, unit.to(tl.int16), mask=start < numel)
    inverse = tl.math.div_rn(tl.full([ROWS], 1.0, tl.float32), (unit << 16).to(tl.float32, bitcast=True))
    inverse = tl.where(inverse > 1.2676506002282294e30, 0.0, inverse)  # 2^100: as on the CPU, there is no such unit
    # Adding 1.5 * 2^23 leaves no bits behind the point: to the nearest, to the even one of two.
    rounded = (value * inverse[:, None] + 12582912.0) - 12582912.0
    # What is not in range comes of NaN or Inf: the caller sees it in the maxima, and writes another payload.
    whole = tl.where(tl.abs(rounded) <= LEVELS, rounded, 0.0).to(tl.int32)
    if BITS == 8:
        tl.store(packed + at, whole.to(tl.uint8), mask=inside)
    else:
        low, high = tl.split(tl.reshape(whole & 15, [ROWS, WIDE // 2, 2]))
        pair = tl.arange(0, WIDE // 2)[None, :]
        within = (2 * pair < block) & (start[:, None] + 2 * pair < numel)
        tl.store(packed + (start // 2)[:, None] + pair, (low | (high << 4)).to(tl.uint8), mask=within)


@triton.jit
def add_blocks(units, packed, out, scale, numel, block, whole, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """out += scale * unit * integer; ``whole`` is how many entries stand in whole blocks."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    unit = (tl.load(units + at // block, mask=inside, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True) * scale
    if BITS == 8:
        integer = tl.load(packed + at, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.int32)
    else:
        # A last block that is not whole starts with a byte of its own.
        place = tl.where(at < whole, at, at - whole + (whole + whole % 2))
        byte = tl.load(packed + place // 2, mask=inside, other=0).to(tl.int32)
        integer = (((byte >> (4 * (place % 2))) & 15) ^ 8) - 8
    tl.store(out + at, tl.load(out + at, mask=inside, other=0.0) + integer.to(tl.float32) * unit, mask=inside)


@triton.jit
def absolute_sums(x, sums, largest, numel, BLOCK: tl.constexpr):
    """Of each block the sum of |x| and the largest magnitude."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < numel, other=0.0)
    tl.store(sums + block, tl.sum(tl.abs(value), axis=0))
    tl.store(largest + block, tl.max(_magnitude(value), axis=0))


@triton.jit
def pack_signs(x, packed, numel, BLOCK: tl.constexpr):
    """Sign bits, eight in a byte."""
    byte = tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    place = tl.arange(0, 8)[None, :]
    at = byte[:, None] * 8 + place
    value = tl.load(x + at, mask=at < numel, other=0.0)
    bits = (value.to(tl.int32, bitcast=True) < 0).to(tl.int32) << place
    tl.store(packed + byte, tl.sum(bits, axis=1).to(tl.uint8), mask=byte * 8 < numel)


@triton.jit
def add_signs(packed, mean, out, scale, numel, BLOCK: tl.constexpr):
    """out += scale * mean, or less it where the bit is 1."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    bit = (tl.load(packed + at // 8, mask=inside, other=0).to(tl.int32) >> (at % 8)) & 1
    step = tl.load(mean) * scale
    value = tl.load(out + at, mask=inside, other=0.0)
    tl.store(out + at, value + tl.where(bit == 1, -step, step), mask=inside)
