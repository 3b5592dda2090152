"""Blockwise int8 and int4: the bodies that :class:`outlast.comm.compressors.blockwise.Blocks` writes and reads."""

from __future__ import annotations

import torch
from torch import Tensor

from outlast.comm.kernels.launch import ROUNDED, WIDEST_BLOCK, ceil_div, checked, device_code, on, power_of_two
from outlast.errors import CommError

TILE = 4096
"""Entries that a program handles, unless a block has more."""
WARPS = 8


def fits_blocks(bits: int, block: int) -> bool:
    """Whether :func:`quantise_blocks` takes blocks of ``block`` entries: at most 8192, and for 4 bits an even number,
    so that no byte belongs to two blocks."""
    return 1 <= block <= WIDEST_BLOCK and (bits == 8 or (bits == 4 and block % 2 == 0))


def quantise_blocks(x: Tensor, bits: int, block: int, body: Tensor) -> Tensor:
    """Quantise blocks in one pass: with M the largest |x| of a block and L = 2^(bits - 1) - 1, the unit is M / L, up to
    the next bfloat16, and an entry the nearest whole number of units, of two the even one.

    The bytes are those of ``Blocks._write`` on the CPU. (Torch on CUDA divides by multiplying with the inverse, which
    gives other bits in some units.)

    x must be in the range in which the codec works, max |x| = 0 or 2^-60 <= max |x| < 2^100. Whether it is, only the
    result tells. If it is not, the body's bytes are meaningless and must be written again.

    Args:
        x: (n,), contiguous, float32; n > 0.
        bits: 8 or 4.
        block: see :func:`fits_blocks`.
        body: (>= 2 ceil(n / block) + ceil(n * bits / 8),) uint8, at an even address: ceil(n / block) units, two bytes
            each, then the integers, for 4 bits two in a byte, the first in the low half. The rest is not touched.

    Returns:
        (ceil(n / block),) float32: max |x| of each block, NaN where there is one.

    Raises:
        CommError: a tensor or block is not of that kind.
        MissingDependency: Triton is not installed.
    """
    checked("quantise_blocks", x)
    if not fits_blocks(bits, block):
        raise CommError(f"kernels.quantise_blocks: {bits} bits in blocks of {block}", "ask fits_blocks first")
    numel = x.numel()
    blocks, wide = ceil_div(numel, block), power_of_two(block)
    rows = max(TILE // wide, 1)
    units, packed = _parts(body, numel, bits, block)
    maxima = torch.empty(blocks, dtype=torch.float32, device=x.device)
    code = device_code()
    with on(x):
        code.quantise_blocks[(ceil_div(blocks, rows),)](
            x, units, packed, maxima, numel, block,
            LEVELS=2 ** (bits - 1) - 1, BITS=bits, ROWS=rows, WIDE=wide, num_warps=WARPS, **ROUNDED,
        )  # fmt: skip
    return maxima


def add_blocks(body: Tensor, out: Tensor, bits: int, block: int, scale: float = 1.0) -> None:
    """``out += scale * Q(x)``, in one pass; the bits of ``Blocks._add`` on the CPU: the unit times ``scale``, times the
    integer, and the sum, each rounded to float32.

    Args:
        body: uint8, as :func:`quantise_blocks` writes it; for 4 bits the block may be odd too (a last block that is not
            whole then starts with a byte of its own).
        out: (n,), contiguous, float32.
        bits: 8 or 4.
        block: entries of a block.
        scale: taken as float32.

    Raises:
        CommError: a tensor is not of that kind.
        MissingDependency: Triton is not installed.
    """
    checked("add_blocks", out)
    if bits not in (4, 8) or block < 1:
        raise CommError(f"kernels.add_blocks: {bits} bits in blocks of {block}", "bits is 4 or 8, block at least 1")
    numel = out.numel()
    if not numel:
        return
    units, packed = _parts(body, numel, bits, block)
    code = device_code()
    with on(out):
        code.add_blocks[(ceil_div(numel, TILE),)](
            units, packed, out, float(scale), numel, block, numel // block * block,
            BITS=bits, BLOCK=TILE, num_warps=WARPS, **ROUNDED,
        )  # fmt: skip


def _parts(body: Tensor, numel: int, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Units (blocks,) int16, and integers as bytes."""
    at, rest = 2 * ceil_div(numel, block), numel % block
    need = at + ceil_div((numel - rest) * bits, 8) + ceil_div(rest * bits, 8)
    if body.dtype != torch.uint8 or not body.is_contiguous() or body.numel() < need:
        raise CommError(f"kernels: a body of {body.numel()} x {body.dtype}, expected at least {need} bytes")
    return body[:at].view(torch.int16), body[at:]
