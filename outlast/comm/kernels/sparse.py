"""Selection of the largest entries, and the sum of selected entries."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from outlast.comm.kernels.launch import ASSERTING, WIDEST_BLOCK, ceil_div, checked, device_code, on, power_of_two
from outlast.errors import CommError

SAMPLE_FROM = 65_536
"""Tensors of at least this many entries are sampled when the selection is ``auto``."""
SAMPLE = 16_384
BLOCK = 4096
"""Entries that a program handles at a time."""
WARPS = 8
PROGRAMS = 1024
"""Most programs of a histogram: each writes one of its own."""
_SUMMANDS = (torch.float32, torch.bfloat16, torch.float16)
_DIGITS = ((20, 11), (10, 10), (0, 10))
"""(first bit, bits) of the digits of a magnitude, from the highest; without the sign."""


class Selected(NamedTuple):
    """The entries of largest magnitude.

    Attributes:
        indices: (k,) int64, ascending.
        values: (k,) float32.
    """

    indices: Tensor
    values: Tensor


def select(x: Tensor, k: int, selection: str = "auto", *, plus: Tensor | None = None, take: bool = False) -> Selected:
    """The ``k`` entries of largest |x|, exactly: by the bits of |x|, so NaN before Inf before numbers, and of equal
    magnitudes the lower index first; the selection of :func:`outlast.comm.compressors.select.select`.

    With a sample: one pass counts the entries above an estimate, a little low, of the k-th magnitude (and adds
    ``plus`` on its way), one copies them, and the k-th magnitude is found among them, in three histograms of the bits
    of |x|, 11, 10 and 10. Without one, or where fewer than k or more than a quarter of the entries are above the
    estimate, the histograms go through all entries. All launches are queued but for one wait for the number of
    entries above the estimate.

    The sum with ``plus`` is the CPU's bit for bit, except which NaN a NaN becomes: GPUs make one and the same of all,
    so where more than k entries are NaN another k of them may be selected.

    Args:
        x: (numel,), contiguous, float32.
        k: 0 < k <= numel.
        selection: ``auto``, ``exact`` or ``sampled``; it affects speed, never the result.
        plus: (numel,), contiguous, float32, bfloat16 or float16: ``x += plus`` comes first.
        take: ``x -= values`` at the indices comes last: it leaves 0 there, and NaN for NaN and Inf.

    Raises:
        CommError: x or plus is not of that kind, or k out of range.
        MissingDependency: Triton is not installed.
    """
    checked("select", x)
    numel = x.numel()
    if not 0 < k <= numel:
        raise CommError(f"kernels.select: k = {k} of {numel} entries", "0 < k <= numel")
    if plus is not None and (plus.numel() != numel or not plus.is_contiguous() or plus.dtype not in _SUMMANDS):
        raise CommError(
            f"kernels.select: plus of {plus.numel()} x {plus.dtype}, x of {numel} x {x.dtype}",
            "give it x's shape, contiguous, in float32, bfloat16 or float16",
        )
    x = x.view(-1)
    plus = None if plus is None else plus.view(-1)
    if k < numel and (selection == "sampled" or (selection == "auto" and numel >= SAMPLE_FROM)):
        count = min(SAMPLE, numel)
        rank = _rank(count, k, numel)
        if rank <= count // 2:
            return _sampled(x, k, plus, take, count, rank)
    if plus is not None:
        x.add_(plus)
    if k == numel:
        every = Selected(torch.arange(numel, device=x.device), x.clone())
        if take:
            x.sub_(every.values)
        return every
    return _exact(x, None, k, x, take)


def _rank(count: int, k: int, numel: int) -> int:
    """Which of ``count`` sampled magnitudes, from the largest, has at least k of numel above it: three standard
    deviations below the expected rank."""
    expected = count * k / numel
    return math.ceil(expected + 3 * math.sqrt(expected)) + 1


def _sampled(x: Tensor, k: int, plus: Tensor | None, take: bool, count: int, rank: int) -> Selected:
    code = device_code()
    numel, blocks = x.numel(), ceil_div(x.numel(), BLOCK)
    add = plus is not None
    other = x if plus is None else plus
    seen = torch.empty(count, dtype=torch.int32, device=x.device)
    counts = torch.empty(blocks, dtype=torch.int32, device=x.device)
    with on(x):
        code.sample[(ceil_div(count, 1024),)](x, other, seen, numel // count, count, ADD=add, BLOCK=1024)
        # Not kthvalue, which PyTorch refuses on CUDA where deterministic algorithms are asked for.
        threshold = torch.topk(seen, rank, sorted=False).values.amin()
        code.add_and_count[(blocks,)](x, other, threshold, counts, numel, ADD=add, BLOCK=BLOCK, num_warps=WARPS)
        ends = counts.cumsum(0, dtype=torch.int32)
        found = int(ends[-1])
        if not k <= found <= numel // 4:
            return _exact(x, None, k, x, take)
        places = torch.empty(found, dtype=torch.int32, device=x.device)
        values = torch.empty(found, dtype=torch.float32, device=x.device)
        starts = ends.sub_(counts)
        code.candidates[(blocks,)](x, threshold, starts, places, values, numel, BLOCK=BLOCK, num_warps=WARPS)
    return _exact(values, places, k, x, take)


def _exact(values: Tensor, places: Tensor | None, k: int, x: Tensor, take: bool) -> Selected:
    """The k largest of ``values``, which are at ``places`` of x (None: they are x)."""
    code = device_code()
    numel, blocks = values.numel(), ceil_div(values.numel(), BLOCK)
    pieces = ceil_div(blocks, PROGRAMS)
    room = torch.zeros(2 + (1 << max(width for _, width in _DIGITS)), dtype=torch.int32, device=x.device)
    state, bins = room[:2], room[2:]
    counts = torch.empty((2, blocks), dtype=torch.int32, device=x.device)
    indices = torch.empty(k, dtype=torch.int64, device=x.device)
    kept = torch.empty(k, dtype=torch.float32, device=x.device)
    with on(x):
        for turn, (shift, width) in enumerate(_DIGITS):
            digit = {"SHIFT": shift, "WIDTH": width}
            code.histogram[(ceil_div(blocks, pieces),)](
                values, state, bins, numel, pieces, BLOCK=BLOCK, num_warps=WARPS, **digit
            )
            code.descend[(1,)](bins, state, k, FIRST=turn == 0, **digit)
        code.count_kept[(blocks,)](values, state, counts, blocks, numel, BLOCK=BLOCK, num_warps=WARPS)
        before = counts.cumsum(1, dtype=torch.int32).sub_(counts)
        mapped = places is not None
        where = places if mapped else indices
        code.keep[(blocks,)](
            values, where, state, before, indices, kept, x, blocks, numel,
            MAPPED=mapped, TAKE=take, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return Selected(indices, kept)


def largest_in_blocks(x: Tensor, block: int) -> Tensor:
    """Indices of the largest |x| of each block, of equal ones the first: ``select_in_blocks(x, 1, block)``.

    Args:
        x: (numel,), contiguous, float32; numel > 0.
        block: entries of a block, at most 8192; the last one may have fewer.

    Returns:
        (ceil(numel / block),) int64, ascending.

    Raises:
        CommError: x is not of that kind, or the block out of range.
        MissingDependency: Triton is not installed.
    """
    checked("largest_in_blocks", x)
    if not 1 <= block <= WIDEST_BLOCK:
        raise CommError(f"kernels.largest_in_blocks: block = {block}", f"1 <= block <= {WIDEST_BLOCK}")
    code = device_code()
    numel = x.numel()
    blocks, wide = ceil_div(numel, block), power_of_two(block)
    rows = max(BLOCK // wide, 1)
    places = torch.empty(blocks, dtype=torch.int64, device=x.device)
    with on(x):
        code.largest_in_blocks[(ceil_div(blocks, rows),)](
            x, places, numel, block, ROWS=rows, WIDE=wide, num_warps=WARPS
        )
    return places


def add_sparse(out: Tensor, indices: Tensor, values: Tensor, scale: float = 1.0) -> None:
    """``out[indices] += scale * values`` in place: a product and a sum, each rounded, as ``index_add_`` on the CPU.

    Not so ``index_add_`` on CUDA, whose atomic additions take numbers below the smallest normal one for 0. Several
    ranks' entries are added in the order of the calls: launches on a stream follow one another.

    Args:
        out: contiguous, float32; flat positions are meant.
        indices: (k,) int64, contiguous, **no index twice**: two of them would race. One outside of ``out`` stops the
            kernel by a device-side assertion, as in ``index_add_``.
        values: (k,) float32, contiguous.
        scale: taken as float32.

    Raises:
        CommError: a tensor is not of that kind.
        MissingDependency: Triton is not installed.
    """
    checked("add_sparse", out, values)
    if indices.dtype != torch.int64 or not indices.is_contiguous() or indices.numel() != values.numel():
        raise CommError(
            f"kernels.add_sparse: {indices.numel()} x {indices.dtype} indices of {values.numel()} values",
            "give it one int64 index for each value, contiguous",
        )
    count = values.numel()
    if not count:
        return
    code = device_code()
    with on(out):
        code.add_sparse[(ceil_div(count, 1024),)](
            out, indices, values, float(scale), count, out.numel(), BLOCK=1024, **ASSERTING
        )
