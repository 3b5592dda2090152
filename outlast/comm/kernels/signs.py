"""One sign per entry and one mean for all: what :class:`outlast.comm.compressors.signs.Signs` writes and reads."""

from __future__ import annotations

import torch
from torch import Tensor

from outlast.comm.kernels.launch import ROUNDED, ceil_div, checked, device_code, on
from outlast.errors import CommError

TILE = 8192
"""Entries that a program handles."""
WARPS = 8


def absolute_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of |x| over pieces of ``TILE`` entries, and the largest |x|, in one pass.

    Within a piece the order of summation is the kernel's own, the same on every run; it is not the CPU's.

    Args:
        x: (n,), contiguous, float32; n > 0.

    Returns:
        (ceil(n / TILE),) float32; and a scalar, NaN where x holds one.

    Raises:
        CommError: x is not of that kind.
        MissingDependency: Triton is not installed.
    """
    checked("absolute_sums", x)
    pieces = ceil_div(x.numel(), TILE)
    sums = torch.empty(pieces, dtype=torch.float32, device=x.device)
    largest = torch.empty(pieces, dtype=torch.int32, device=x.device)
    code = device_code()
    with on(x):
        code.absolute_sums[(pieces,)](x, sums, largest, x.numel(), BLOCK=TILE, num_warps=WARPS)
    return sums, largest.max().view(torch.float32)


def pack_signs(x: Tensor, packed: Tensor) -> None:
    """The sign bits of x, eight in a byte, low bits first; bits that are left over are 0.

    Args:
        x: (n,), contiguous, float32.
        packed: (ceil(n / 8),) uint8, contiguous.

    Raises:
        CommError: a tensor is not of that kind.
        MissingDependency: Triton is not installed.
    """
    checked("pack_signs", x)
    _bits_of(packed, x.numel())
    code = device_code()
    with on(x):
        code.pack_signs[(ceil_div(x.numel(), TILE),)](x, packed, x.numel(), BLOCK=TILE, num_warps=WARPS)


def add_signs(packed: Tensor, mean: Tensor, out: Tensor, scale: float = 1.0) -> None:
    """``out += scale * mean``, or ``-= `` where the bit is 1; the bits of ``Signs._add`` on the CPU.

    Args:
        packed: as :func:`pack_signs` writes it.
        mean: one float32.
        out: (n,), contiguous, float32.
        scale: taken as float32.

    Raises:
        CommError: a tensor is not of that kind.
        MissingDependency: Triton is not installed.
    """
    checked("add_signs", out, mean)
    _bits_of(packed, out.numel())
    code = device_code()
    with on(out):
        code.add_signs[(ceil_div(out.numel(), TILE),)](
            packed, mean, out, float(scale), out.numel(), BLOCK=TILE, num_warps=WARPS, **ROUNDED
        )


def _bits_of(packed: Tensor, numel: int) -> None:
    if packed.dtype != torch.uint8 or not packed.is_contiguous() or packed.numel() != ceil_div(numel, 8):
        raise CommError(f"kernels: {packed.numel()} x {packed.dtype} for the signs of {numel} entries")
