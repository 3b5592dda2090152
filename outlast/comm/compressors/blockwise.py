"""Blockwise quantisation: integers of eight or four bits, and one unit for each block of entries."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outlast.comm import kernels
from outlast.comm.buffers import scratch
from outlast.comm.compressors import host
from outlast.comm.compressors.bits import Bytes
from outlast.comm.compressors.codecs import Scaled
from outlast.comm.compressors.power_scale import (
    HEADER_BYTES,
    NOT_FINITE,
    read_header,
    times_power,
    write_header,
)

CHUNK = 262_144
"""Entries per pass, so that intermediate results stay in the processor's cache."""
Floats = npt.NDArray[np.float32]
_NO_UNIT_BELOW = 2.0**-100
"""A smaller unit counts as zero: next to a largest entry of 2^-60 or more its block does not matter."""


def rows_of(n: int, block: int) -> Iterator[tuple[int, int, int, int]]:
    """(first entry, end, first block, end) of pieces of about CHUNK entries: whole blocks, an even number of entries;
    an incomplete last block is a piece of its own."""
    per_piece = max(CHUNK // block // 2 * 2, 2)
    whole = n // block
    for first in range(0, whole, per_piece):
        end = min(first + per_piece, whole)
        yield first * block, end * block, first, end
    if n % block:
        yield whole * block, n, whole, whole + 1


def maxima_of(x: Tensor, block: int) -> Tensor:
    """(blocks,) max |x| of each block of a flat tensor; NaN where there is one."""
    whole = len(x) // block
    if len(x) < CHUNK and host.numpy_sees(x):  # few entries: the cost of a call dominates, not that of the loop
        magnitudes = np.abs(x.numpy())
        parts = [magnitudes[: whole * block].reshape(whole, block).max(1)] if whole else []
        if whole * block < len(x):
            parts.append(magnitudes[whole * block :].max(keepdims=True))
        return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))
    result = x.new_empty(-(-len(x) // block))
    if whole:
        blocks = x[: whole * block].view(whole, block)
        torch.maximum(blocks.amax(1), blocks.amin(1).neg_(), out=result[:whole])
    if whole < len(result):
        rest = x[whole * block :]
        result[whole] = torch.maximum(rest.amax(), -rest.amin())
    return result.abs_()  # a zero may be negative


class Blocks(Scaled):
    """Rounds to the nearest multiple of a unit; each block of B entries has its own unit.

    With L = 2^(bits - 1) - 1 and M the block's max |x|, the unit is u = M / L, rounded up to bfloat16, so that
    M/L <= u <= (1 + 2^-7) M/L, and the integers q = round(x / u) lie in [-L, L]. Their products with u are exact.

    Contraction, with c = (1 + 2^-7) / (2 L)::

        alpha = (1 - c^2) / (1 + (B - 1) c^2)

    Proof for one block, which the sum over blocks inherits. Rounding to the nearest multiple is off by at most
    h = u/2 <= c M, and by at most |x_i|, because 0 is a multiple. So ||Q(x) - x||^2 <= h^2 + sum min(x_i^2, h^2), the
    sum over the B - 1 entries other than the largest, while ||x||^2 = M^2 + sum x_i^2. The ratio of the two is below 1;
    it falls when some x_i^2 > h^2 grows, and rises when some x_i^2 < h^2 does; so it is largest with all of them at h,
    where it is B c^2 / (1 + (B - 1) c^2). For 8 bits in blocks of 256 alpha is 0.9960; for 4 bits in blocks of 32,
    0.857.

    Bytes: 8 (see :mod:`outlast.comm.compressors.power_scale`), 2 per block, and bits / 8 per entry.
    """

    def __init__(self, bits: int, block: int) -> None:
        assert bits in (4, 8)
        assert block >= 1
        self.name = f"int{bits}"
        self.bits = bits
        self.block = block
        self.levels: int = 2 ** (bits - 1) - 1

    def alpha(self, n: int) -> float:
        c = (1 + 2**-7) / (2 * self.levels)
        return (1 - c * c) / (1 + (max(min(self.block, n), 1) - 1) * c * c)

    def _body_bytes(self, n: int) -> int:
        rest = n % self.block
        return self._units_bytes(n) + self._bytes(n - rest) + self._bytes(rest)

    def _bytes(self, entries: int) -> int:
        """Bytes of ``entries`` integers; an incomplete last block starts at a byte of its own."""
        return -(-entries * self.bits // 8)

    def _place(self, start: int, stop: int) -> slice:
        """Where the integers of a piece are."""
        first = self._bytes(start)
        return slice(first, first + self._bytes(stop - start))

    def _units_bytes(self, n: int) -> int:
        return 2 * -(-n // self.block)

    def _maxima(self, x: Tensor) -> Tensor:
        return maxima_of(x, self.block)

    def write(self, x: Tensor, out: Tensor) -> None:
        if not x.numel() or not kernels.fits_blocks(self.bits, self.block) or not kernels.handles(x):
            super().write(x, out)
            return
        out[-8:].zero_()  # padding
        body = out[HEADER_BYTES:]
        exponent = self._exponent(float(kernels.quantise_blocks(x, self.bits, self.block, body).max()), x.dtype)
        if exponent == NOT_FINITE:
            body.zero_()
        elif exponent:
            kernels.quantise_blocks(times_power(x, -exponent), self.bits, self.block, body)
        write_header(out, exponent)

    def _write(self, x: Tensor, maxima: Tensor, body: Tensor) -> None:
        at = self._units_bytes(len(x))
        if host.numpy_sees(x):
            self._write_arrays(x.numpy(), maxima.numpy(), body.numpy())
            return
        bits = maxima.div_(self.levels).view(torch.int32).add_(0xFFFF).bitwise_right_shift_(16)
        units = body[:at].view(torch.int16)
        units.copy_(bits)
        inverse = (bits << 16).view(torch.float32).reciprocal_()
        inverse.masked_fill_(inverse > 1 / _NO_UNIT_BELOW, 0.0)
        for start, stop, first, end in rows_of(len(x), self.block):
            rounded = (x[start:stop].view(end - first, -1) * inverse[first:end, None]).round_().view(-1)
            quantised = body[at:][self._place(start, stop)]
            if self.bits == 8:
                quantised.view(torch.int8).copy_(rounded)
            else:
                nibbles = torch.zeros(2 * len(quantised), dtype=torch.uint8, device=x.device)
                nibbles[: len(rounded)].copy_(rounded.to(torch.int8) & 0x0F)
                quantised.copy_(nibbles[::2] | (nibbles[1::2] << 4))

    @np.errstate(all="ignore")
    def _write_arrays(self, x: Floats, maxima: Floats, body: Bytes) -> None:
        at = self._units_bytes(len(x))
        bits = ((maxima / np.float32(self.levels)).view(np.int32) + 0xFFFF) >> 16
        body[:at].view(np.int16)[:] = bits
        inverse = 1 / (bits << 16).view(np.float32)
        inverse[inverse > 1 / _NO_UNIT_BELOW] = 0
        room = _floats("rounded", min(max(CHUNK, 2 * self.block), len(x)))
        for start, stop, first, end in rows_of(len(x), self.block):
            rounded = room[: stop - start]
            np.multiply(
                x[start:stop].reshape(end - first, -1), inverse[first:end, None], out=rounded.reshape(end - first, -1)
            )
            np.rint(rounded, out=rounded)
            quantised = body[at:][self._place(start, stop)]
            if self.bits == 8:
                np.copyto(quantised.view(np.int8), rounded, casting="unsafe")
            else:
                pairs = np.zeros(len(quantised), np.int16)
                np.copyto(pairs.view(np.int8)[: len(rounded)], rounded, casting="unsafe")
                np.copyto(quantised, (pairs & 0x0F) | ((pairs >> 4) & 0xF0), casting="unsafe")

    @np.errstate(all="ignore")
    def read_rows(self, payloads: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        """As the base class, but many short rows of eight bits take a few calls."""
        whole = n // self.block * self.block
        short = self.bits == 8 and dtype == torch.float32 and 0 < n <= CHUNK and host.numpy_sees(payloads)
        if not short or any(read_header(row) for row in payloads):
            return super().read_rows(payloads, n, dtype)
        raw = payloads.numpy()[:, HEADER_BYTES:]
        at = self._units_bytes(n)
        units = (np.ascontiguousarray(raw[:, :at]).view(np.int16).astype(np.int32) << 16).view(np.float32)
        result = raw[:, at : at + n].view(np.int8).astype(np.float32)
        if whole:
            blocks = result[:, :whole].reshape(len(raw), -1, self.block)
            result[:, :whole] = (blocks * units[:, : whole // self.block, None]).reshape(len(raw), whole)
        if whole < n:
            result[:, whole:] *= units[:, -1:]
        # As in the sum with zero by which single rows are read: -0 becomes 0.
        result += np.float32(0)
        return torch.from_numpy(result)

    def _add(self, body: Tensor, out: Tensor, scale: float) -> None:
        if kernels.handles(out):
            kernels.add_blocks(body, out, self.bits, self.block, scale)
            return
        at = self._units_bytes(len(out))
        if host.numpy_sees(out):
            self._add_arrays(body.numpy(), out.numpy(), scale)
            return
        units = (body[:at].view(torch.int16).to(torch.int32) << 16).view(torch.float32).mul_(scale)
        for start, stop, first, end in rows_of(len(out), self.block):
            quantised = body[at:][self._place(start, stop)]
            if self.bits == 8:
                whole = quantised.view(torch.int8)
            else:
                nibbles = torch.stack((quantised & 0x0F, quantised >> 4), dim=1).view(-1)[: stop - start]
                whole = (nibbles.to(torch.int8) ^ 8) - 8
            # A product and a sum, each rounded: a fused operation would round once where the processor has one.
            out[start:stop].add_((whole.to(torch.float32).view(end - first, -1) * units[first:end, None]).view(-1))

    @np.errstate(all="ignore")
    def _add_arrays(self, body: Bytes, out: Floats, scale: float) -> None:
        at = self._units_bytes(len(out))
        units = (body[:at].view(np.int16).astype(np.int32) << 16).view(np.float32) * np.float32(scale)
        room = _floats("decoded", min(max(CHUNK, 2 * self.block), len(out)))
        for start, stop, first, end in rows_of(len(out), self.block):
            decoded, quantised = room[: stop - start], body[at:][self._place(start, stop)]
            if self.bits == 8:
                np.copyto(decoded, quantised.view(np.int8))
            else:
                pairs = quantised.astype(np.uint16)
                pairs |= pairs << 4
                pairs &= 0x0F0F
                # The sign, bit 3, into bits 4 to 7 of each byte.
                pairs |= (pairs & 0x0808) * np.uint16(0x1E)
                np.copyto(decoded, pairs.view(np.int8)[: stop - start])
            rows = decoded.reshape(end - first, -1)
            np.multiply(rows, units[first:end, None], out=rows)
            out[start:stop] += decoded


def _floats(use: str, n: int) -> Floats:
    array: Floats = scratch(use, n, torch.float32, torch.device("cpu")).numpy()
    return array
