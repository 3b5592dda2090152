"""Powers of two that bring a tensor into the range in which codecs work.

A codec that rounds works on float32 numbers whose largest is in [2^-60, 2^100). That is far enough from both ends that
squares and sums do not overflow, and that losses below the smallest normal number do not count. Gradients outside that
range are multiplied by a power of two, which is exact, and the exponent travels in the payload.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from outlast.comm.compressors import host

NOT_FINITE = 2**31 - 1
"""Replaces the exponent if the tensor holds NaN or Inf, or numbers that are too large to be rounded up."""
HEADER_BYTES = 8
_LOWEST, _HIGHEST = 2.0**-60, 2.0**100
_OVERFLOW = {torch.float32: 1.5 * 2.0**127, torch.float64: 1.5 * 2.0**1023}


def exponent_for(largest: float, dtype: torch.dtype) -> int:
    """e such that ``x * 2^-e`` is in range; 0 if x is in range or zero; NOT_FINITE for NaN, Inf and |x| >= 1.5 * 2^127
    (2^1023 for float64), which would round up to Inf."""
    if not largest < _OVERFLOW[dtype]:
        return NOT_FINITE
    if largest == 0 or _LOWEST <= largest < _HIGHEST:
        return 0
    return math.frexp(largest)[1] - 1


def times_power(x: Tensor, exponent: int) -> Tensor:
    """``x * 2^exponent`` as a new tensor; in two steps, because 2^exponent may overflow x's type when the result does
    not."""
    half = exponent // 2
    return x.mul(2.0**half).mul_(2.0 ** (exponent - half))


def write_header(payload: Tensor, exponent: int) -> None:
    """Write the exponent to the first eight bytes."""
    if host.numpy_sees(payload):
        payload.numpy()[:HEADER_BYTES].view(np.int32)[:] = exponent, 0
    else:
        payload[:HEADER_BYTES].view(torch.int64).fill_(exponent % 2**32)  # little-endian: the exponent, then 0


def read_header(payload: Tensor) -> int:
    """The exponent, or NOT_FINITE."""
    if host.numpy_sees(payload):
        return int(payload.numpy()[:4].view(np.int32)[0])
    return int(payload[:4].view(torch.int32))


def largest_of(x: Tensor) -> float:
    """max |x|; NaN if x holds one, 0 if it has no entries."""
    if not x.numel():
        return 0.0
    # Not abs().max(), aminmax() or a norm: on the CPU these take several times as long.
    return float(torch.maximum(x.amax(), -x.amin()))
