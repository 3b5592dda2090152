"""Codecs of one bit a sign, with one magnitude for many entries, or with a byte of exponent for each."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from outlast.comm import kernels
from outlast.comm.buffers import scratch
from outlast.comm.compressors import host
from outlast.comm.compressors.bits import pack_bits, packed_nbytes, unpack_bits
from outlast.comm.compressors.blockwise import CHUNK, rows_of
from outlast.comm.compressors.codecs import Scaled
from outlast.comm.compressors.power_scale import HEADER_BYTES, write_header

_DEVICE_CHUNK = 1 << 25


class Signs(Scaled):
    """The sign of each entry, and the mean of |x| over each block (or over all). arXiv 1809.07599, arXiv 1901.09847::

        Q(x) = (||x||_1 / B) sign(x)        ||Q(x) - x||^2 = ||x||^2 - ||x||_1^2 / B

    so alpha = ||x||_1^2 / (B ||x||_2^2), which is at least 1/B, with equality if only one entry is not zero; for
    normally distributed entries it is 2/pi. A scale of ||x||_2 / sqrt(B) instead would not be contractive: it is off by
    2 (1 - ||x||_1 / (sqrt(B) ||x||_2)) ||x||^2, up to 2 ||x||^2.

    Zero counts as positive, which does not change either equation.

    Bytes: 8 (see :mod:`outlast.comm.compressors.power_scale`), 4 per block, and 1/8 per entry.
    """

    name = "sign"

    def __init__(self, block: int | None = None) -> None:
        self.block = block

    def alpha(self, n: int) -> float:
        return 1 / max(min(n, self.block or n), 1)

    def typical_alpha(self, n: int) -> float:
        return max(2 / math.pi, self.alpha(n))

    def write(self, x: Tensor, out: Tensor) -> None:
        n = len(x)
        if not n or self.block is not None or not kernels.handles(x):
            super().write(x, out)
            return
        sums, largest = kernels.absolute_sums(x)
        if self._exponent(float(largest), x.dtype):
            super().write(x, out)
            return
        out[-8:].zero_()  # padding
        write_header(out, 0)
        body = out[HEADER_BYTES:]
        body[:4].view(torch.float32).copy_(sums.to(torch.float64).sum().div_(n))
        kernels.pack_signs(x, body[4 : 4 + packed_nbytes(n)])

    def _blocks(self, n: int) -> int:
        return -(-n // (self.block or n))

    def _body_bytes(self, n: int) -> int:
        return 4 * self._blocks(n) + packed_nbytes(n)

    def _write(self, x: Tensor, maxima: Tensor, body: Tensor) -> None:
        n, at = len(x), 4 * self._blocks(len(x))
        pack_bits(_negative(x), body[at : at + packed_nbytes(n)])
        body[:at].view(torch.float32).copy_(self._means(x))

    def _means(self, x: Tensor) -> Tensor:
        """(blocks,) means of |x|; of a whole tensor in double precision, because so many are summed."""
        block = self.block or CHUNK
        sums = x.new_empty(-(-len(x) // block))
        room = scratch("magnitudes", max(CHUNK, 2 * block), torch.float32, x.device)
        for start, stop, first, end in rows_of(len(x), block):
            magnitudes = torch.abs(x[start:stop], out=room[: stop - start])
            torch.sum(magnitudes.view(end - first, -1), 1, out=sums[first:end])
        if self.block is None:
            return sums.to(torch.float64).sum().div_(len(x))
        sums.div_(block)
        rest = len(x) % block
        if rest:
            sums[-1] *= block / rest
        return sums

    def _add(self, body: Tensor, out: Tensor, scale: float) -> None:
        n, at = len(out), 4 * self._blocks(len(out))
        if self.block is None and kernels.handles(out):
            kernels.add_signs(body[at : at + packed_nbytes(n)], body[:at].view(torch.float32), out, scale)
            return
        means = body[:at].view(torch.float32) * scale
        packed = body[at : at + packed_nbytes(n)]
        if self.block is None:
            for start in range(0, n, CHUNK):
                stop = min(start + CHUNK, n)
                out[start:stop].add_(_signed(packed[start // 8 : -(-stop // 8)], stop - start).mul_(means))
            return
        whole = n // self.block * self.block
        signs = _signed(packed, n)
        blocks = signs[:whole].view(-1, self.block)
        blocks.mul_(means[: len(blocks), None])
        signs[whole:].mul_(means[-1])
        out.add_(signs)


class Powers(Scaled):
    """Natural compression: each entry is rounded to the nearest power of two; sign and exponent are nine bits.
    arXiv 1905.10988.

    For x = 2^e m with 1 <= m < 2, the nearest power is off by 2^e times |m - 1| or |2 - m|; the smaller is at most m/3,
    at m = 3/2. So ||Q(x) - x||^2 <= ||x||^2 / 9 and alpha = 8/9. The paper rounds at random, up with probability m - 1,
    which is unbiased with E||Q(x) - x||^2 <= ||x||^2 / 8; times 8/9 it is contractive with the same alpha. Rounding to
    nearest has the smaller error on every x and the same bits in every run, and error feedback does not need an
    unbiased estimate.

    Bytes: 8 (see :mod:`outlast.comm.compressors.power_scale`), and 9/8 per entry.
    """

    name = "natural"

    def alpha(self, n: int) -> float:
        return 8 / 9

    def _body_bytes(self, n: int) -> int:
        return n + packed_nbytes(n)

    def _write(self, x: Tensor, maxima: Tensor, body: Tensor) -> None:
        n = len(x)
        piece = _piece(x)
        room = scratch("exponents", min(piece, n), torch.int32, x.device)
        for start in range(0, n, piece):
            stop = min(start + piece, n)
            bits = torch.bitwise_and(x[start:stop].view(torch.int32), 0x7FFFFFFF, out=room[: stop - start])
            # Adding half of the mantissa's range carries over into the exponent if m >= 3/2.
            body[start:stop].copy_(bits.add_(0x400000).bitwise_right_shift_(23))
        pack_bits(_negative(x), body[n : n + packed_nbytes(n)])

    def _add(self, body: Tensor, out: Tensor, scale: float) -> None:
        n = len(out)
        signs = body[n : n + packed_nbytes(n)]
        piece = _piece(out)
        room = scratch("exponents", min(piece, n), torch.int32, out.device)
        for start in range(0, n, piece):
            stop = min(start + piece, n)
            bits = room[: stop - start]
            bits.copy_(body[start:stop])
            powers = bits.bitwise_left_shift_(23).view(torch.float32)
            powers.mul_(_signed(signs[start // 8 : -(-stop // 8)], stop - start))
            out[start:stop].add_(powers if scale == 1.0 else powers.mul_(scale))


def _piece(x: Tensor) -> int:
    """Entries handled at a time: what stays in a processor's cache, or what a device needs to be busy."""
    return CHUNK if host.numpy_sees(x) else _DEVICE_CHUNK


def _negative(x: Tensor) -> Tensor:
    """(n,) bool: the sign bits of float32."""
    bits, room = x.view(torch.int32), scratch("negative", len(x), torch.bool, x.device)
    if host.numpy_sees(x):  # numpy does this several times as fast
        np.less(bits.numpy(), 0, out=room.numpy())
        return room
    return torch.lt(bits, 0, out=room)


def _signed(packed: Tensor, count: int) -> Tensor:
    """(count,) float32, 1 for a bit that is 0 and -1 for 1; valid until the next call."""
    room = scratch("signs", 8 * len(packed), torch.float32, packed.device)
    if host.numpy_sees(packed):
        np.take(_EIGHTS, packed.numpy(), axis=0, out=room.numpy().reshape(-1, 8), mode="clip")
        return room[:count]
    return room[:count].copy_(unpack_bits(packed, count)).mul_(-2.0).add_(1.0)


_EIGHTS = 1 - 2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.float32)
