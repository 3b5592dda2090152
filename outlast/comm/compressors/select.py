"""Selects the k entries of largest magnitude of a flat tensor, always exactly, and always the same ones.

Magnitudes are compared as the bit patterns of |x|, read as integers: for IEEE floats that is the order of the numbers,
with Inf above every number and NaN above Inf. Hence **a NaN or Inf in the tensor is always among the selected
entries** (k >= 1), and checking those checks the whole tensor. Among equal magnitudes the lower index
wins, so the selection does not depend on the algorithm, the device, or the number of threads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outlast.comm import kernels
from outlast.comm.buffers import scratch
from outlast.comm.compressors import host

SAMPLE_FROM = 65_536
"""Tensors of at least this many entries are sampled when the selection is ``auto``."""
_SAMPLE = 16_384
CHUNK = 1_048_576
"""Entries handled at a time, so that what passes from one operation to the next stays in the processor's cache."""
_BITS = {torch.float32: (torch.int32, 0x7FFFFFFF), torch.float64: (torch.int64, 0x7FFFFFFFFFFFFFFF)}

IntArray = npt.NDArray[np.signedinteger[Any]]


def select(x: Tensor, k: int, selection: str) -> Tensor:
    """Indices of the ``k`` largest |x|.

    Args:
        x: (numel,), contiguous, float32 or float64.
        k: 0 < k <= numel.
        selection: ``auto``, ``exact`` or ``sampled``; it affects speed, never the result.

    Returns:
        (k,) int64 on x's device, ascending.
    """
    numel = x.numel()
    if k >= numel:
        return torch.arange(numel, device=x.device)
    if kernels.handles(x):
        return kernels.select(x, k, selection).indices
    if not host.numpy_sees(x):
        return select_on_device(x, k)
    indices = None
    if selection == "sampled" or (selection == "auto" and numel >= SAMPLE_FROM):
        indices = _among_candidates(x, k)
    return torch.from_numpy(_exact(_magnitude_bits(x).numpy(), k) if indices is None else indices)


def select_on_device(x: Tensor, k: int) -> Tensor:
    """As :func:`select`, in torch operations alone, for tensors that numpy cannot access."""
    bits = _magnitude_bits(x)
    kth = torch.topk(bits, k, sorted=False).values.min()
    above = torch.nonzero(bits > kth).view(-1)
    ties = torch.nonzero(bits == kth).view(-1)[: k - above.numel()]
    return torch.cat((above, ties)).sort().values


def _magnitude_bits(x: Tensor) -> Tensor:
    """|x| as integers, of x's shape; valid until the next call."""
    kind, mask = _BITS[x.dtype]
    out = scratch("magnitude", x.numel(), kind, x.device).view(x.shape)
    return torch.bitwise_and(x.view(kind), mask, out=out)


def _exact(bits: IntArray, k: int) -> npt.NDArray[np.int64]:
    """Positions, ascending, of the k largest; among equal ones the first."""
    last = len(bits) - k
    kth = np.partition(bits, last)[last]
    mask = scratch("mask", len(bits), torch.bool, torch.device("cpu")).numpy()
    chosen = np.flatnonzero(np.greater_equal(bits, kth, out=mask))
    surplus = len(chosen) - k
    if surplus:
        ties = np.flatnonzero(bits[chosen] == kth)
        chosen = np.delete(chosen, ties[-surplus:])
    return chosen


def _among_candidates(x: Tensor, k: int) -> npt.NDArray[np.int64] | None:
    """As :func:`_exact`, among the entries above an estimated threshold; None if fewer than k are above it."""
    numel = x.numel()
    stride = _stride(numel)
    # If the whole stays in cache, magnitudes are computed once; else only those that are needed.
    bits = _magnitude_bits(x).numpy() if numel <= CHUNK else None
    sample = _magnitude_bits(x[::stride].contiguous()).numpy() if bits is None else bits[::stride]
    expected = len(sample) * k / numel
    # Three standard deviations of the hit count below the k-th quantile: the threshold is too high once in a thousand.
    rank = math.ceil(expected + 3 * math.sqrt(expected)) + 1
    if rank > len(sample) // 2:
        return None
    threshold = np.partition(sample, len(sample) - rank)[len(sample) - rank]
    if threshold == 0:
        return None
    candidates = _at_least(x, threshold) if bits is None else _places_of(bits, threshold)
    if len(candidates) < k:
        return None
    if len(candidates) == k:
        return candidates
    if bits is None:
        among = _magnitude_bits(torch.index_select(x, 0, torch.from_numpy(candidates))).numpy()
    else:
        among = bits[candidates]
    result: npt.NDArray[np.int64] = candidates[_exact(among, k)]
    return result


def _at_least(x: Tensor, threshold: np.signedinteger[Any]) -> npt.NDArray[np.int64]:
    """Positions, ascending, of magnitudes of at least ``threshold``: one pass over x, the rest stays in cache."""
    pieces = []
    for start in range(0, x.numel(), CHUNK):
        places = _places_of(_magnitude_bits(x[start : start + CHUNK]).numpy(), threshold)
        places += start
        pieces.append(places)
    return np.concatenate(pieces)


def _places_of(bits: IntArray, threshold: np.signedinteger[Any]) -> npt.NDArray[np.int64]:
    mask = scratch("mask", len(bits), torch.bool, torch.device("cpu")).numpy()
    return np.flatnonzero(np.greater_equal(bits, threshold, out=mask))


def _stride(numel: int) -> int:
    """A prime near numel / sample size. It shares no factor with the row length of a weight matrix, so the sample
    covers all columns."""
    stride = max(numel // _SAMPLE, 1)
    while stride > 1 and any(stride % d == 0 for d in range(2, math.isqrt(stride) + 1)):
        stride += 1
    return stride


def select_in_blocks(x: Tensor, k: int, block: int) -> Tensor:
    """Indices of the ``k`` largest |x| of each block.

    Args:
        x: (numel,), contiguous, float32 or float64.
        k: 0 < k <= block.
        block: entries of a block; an incomplete last block gives min(k, its entries).

    Returns:
        int64 on x's device, ascending; among equal magnitudes the first.
    """
    if k == 1 and block <= kernels.WIDEST_BLOCK and kernels.handles(x):
        return kernels.largest_in_blocks(x, block)
    numel = x.numel()
    whole = numel // block
    indices = _in_whole_blocks(x[: whole * block].view(whole, block), k) if whole else None
    if not numel % block:
        assert indices is not None
        return indices
    rest = x[whole * block :]
    last = select(rest, min(k, len(rest)), "exact")
    last += whole * block
    return last if indices is None else torch.cat((indices, last))


def _in_whole_blocks(x: Tensor, k: int) -> Tensor:
    """(blocks * k,) flat positions in (blocks, block) numbers."""
    blocks, block = x.shape
    per_piece = max(CHUNK // block, 1)
    pieces = []
    for first in range(0, blocks, per_piece):
        places = _in_piece(_magnitude_bits(x[first : first + per_piece]), k)
        places += first * block
        pieces.append(places)
    return torch.cat(pieces)


def _in_piece(bits: Tensor, k: int) -> Tensor:
    blocks, block = bits.shape
    if k == 1:
        kth = bits.amax(1)
    elif host.numpy_sees(bits):
        kth = torch.from_numpy(np.partition(bits.numpy(), block - k, axis=1)[:, block - k].copy())
    else:
        kth = torch.topk(bits, k, dim=1, sorted=False).values.amin(1)
    mask = scratch("mask", bits.numel(), torch.bool, bits.device).view(bits.shape)
    if host.numpy_sees(bits):
        np.greater_equal(bits.numpy(), kth.numpy()[:, None], out=mask.numpy())
    else:
        torch.ge(bits, kth[:, None], out=mask)
    chosen = _places(mask)
    if len(chosen) == blocks * k:
        return chosen
    # In some blocks several entries equal the k-th; the first of them are kept.
    rows = torch.nonzero(mask.sum(1) > k).view(-1)
    magnitudes, limits = bits[rows], kth[rows, None]
    above, ties = magnitudes > limits, magnitudes == limits
    needed = k - above.sum(1, keepdim=True)
    mask[rows] = above | (ties & (ties.cumsum(1) <= needed))
    return _places(mask)


def _places(mask: Tensor) -> Tensor:
    if host.numpy_sees(mask):
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero().view(-1)
