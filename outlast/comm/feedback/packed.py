"""A slot in 8-bit integers: a quarter of the memory of float32, an eighth of float64.

The flat tensor x is cut into blocks of 256 entries. With s = max |x| / 126.5 of a block and u in [0, 1)::

    q = floor(x / s + u)    kept, one byte        x' = s q        read

u differs for every place in a block and every round: u_t(j) = frac(j phi + t phi'), a Weyl sequence in t for each j. So
over rounds the mean of x' is x to O(1 / rounds), without a random number generator, and entries far below s are not
lost but kept whole now and then (plain rounding would drop the same small entry each time). |x' - x| < s, and 0 stays
0. Blocks whose largest entry is below 1e-36 read as 0.

A slot ``e`` is stored in three tensors: ``e_int8`` (x's shape, int8), ``e_scale`` (blocks,) float32, and ``e_round``
(1,) int64, the number of times it was written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outlast.comm.buffers import scratch
from outlast.comm.compressors import Shape, Slots
from outlast.comm.compressors.base import numel_of

BLOCK = 256
PARTS = ("int8", "scale", "round")
_PHI = 0x9E3779B1
_PHI_ROUND = 0xB504F333


def new_slot(slot: str, shape: Shape, device: torch.device) -> Slots:
    """The three tensors of a slot that is zero and was never written to."""
    return {
        f"{slot}_int8": torch.zeros(shape, dtype=torch.int8, device=device),
        f"{slot}_scale": torch.zeros(-(-numel_of(shape) // BLOCK), dtype=torch.float32, device=device),
        f"{slot}_round": torch.zeros(1, dtype=torch.int64, device=device),
    }


def pack_slot(slots: Slots, slot: str, x: Tensor) -> None:
    """Write ``x`` (contiguous, float32 or float64, of the slot's shape) into the slot's three tensors, in place.

    ``x`` is overwritten with what is read back. A block that holds NaN or Inf reads as NaN.
    """
    q, scale, written = (slots[f"{slot}_{part}"] for part in PARTS)
    numel, blocks = x.numel(), scale.numel()
    if numel == 0:
        return
    if numel == blocks * BLOCK:
        rows = x.view(blocks, BLOCK)
    else:
        padded = scratch("packed", blocks * BLOCK, x.dtype, x.device)
        padded[:numel].copy_(x.view(-1))
        padded[numel:].zero_()
        rows = padded.view(blocks, BLOCK)
    # 126.5 leaves room for rounding: even with u, q stays within -127 .. 127.
    largest = torch.maximum(rows.amax(1), -rows.amin(1)).div_(126.5).to(scale.dtype)
    scale.copy_(torch.where(torch.isfinite(largest), largest.where(largest > 1e-38, 0.0), torch.nan))
    inverse = torch.where(scale > 0, 1 / scale, 0.0).to(x.dtype)
    torch.addcmul(_dither(int(written), x.device, x.dtype), rows, inverse[:, None], out=rows)
    q.view(-1).copy_(rows.view(-1)[:numel].floor_())
    written += 1
    unpack_slot(slots, slot, x)


def unpack_slot(slots: Slots, slot: str, out: Tensor) -> Tensor:
    """Read the slot into ``out`` (contiguous, float32 or float64, of its shape), and return it."""
    q, scale = slots[f"{slot}_int8"], slots[f"{slot}_scale"]
    flat = out.view(-1).copy_(q.view(-1))
    whole = flat.numel() // BLOCK
    flat[: whole * BLOCK].view(whole, BLOCK).mul_(scale[:whole].to(out.dtype)[:, None])
    if flat.numel() > whole * BLOCK:
        flat[whole * BLOCK :].mul_(scale[whole].to(out.dtype))
    return out


def _dither(written: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(256,) in [0, 1): of round ``written``."""
    at = torch.arange(BLOCK, dtype=torch.int64, device=device)
    at.mul_(_PHI).add_(written * _PHI_ROUND % 2**32).bitwise_and_(0xFFFFFF00)
    return at.to(dtype).mul_(2.0**-32)
