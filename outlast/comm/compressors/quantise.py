"""Compressors that send every entry, in fewer bits."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from outlast.comm.compressors.base import Compressor, Message, Shape, Slots, flat, numel_of, wire_dtype
from outlast.comm.compressors.codecs import Codec
from outlast.comm.compressors.value_codec import INT4_BLOCK, INT8_BLOCK, codec


class CodedMessage(Message):
    """Every entry, in order, in the bytes of a codec; decoded piece by piece as it is added.

    Args:
        payload: (nbytes,) uint8.
        code: the codec.
        n: entries.
        dtype: of the tensor, float32 or float64.
    """

    def __init__(self, payload: Tensor, code: Codec, n: int, dtype: torch.dtype) -> None:
        super().__init__(payload)
        self._code = code
        self._n = n
        self._dtype = dtype

    def add_to(self, out: Tensor, scale: float = 1.0) -> None:
        self._code.add_to(self.payload, out.view(-1), scale)

    def finite(self) -> bool:
        return self._code.finite(self.payload, self._n, self._dtype)


class Quantiser(Compressor):
    """Sends every entry through a codec."""

    def __init__(self, code: Codec) -> None:
        self._code = code

    def nbytes(self, shape: Shape, dtype: torch.dtype = torch.float32) -> int:
        return self._code.nbytes(numel_of(shape), wire_dtype(dtype))

    def alpha(self, shape: Shape) -> float:
        return self._code.alpha(numel_of(shape))

    def typical_alpha(self, shape: Shape) -> float:
        return self._code.typical_alpha(numel_of(shape))

    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> CodedMessage:
        payload = self._room(x, out)
        x = flat(x)
        self._code.write(x, payload)
        return CodedMessage(payload, self._code, x.numel(), x.dtype)

    def open(self, payload: Tensor, shape: Shape, dtype: torch.dtype = torch.float32) -> CodedMessage:
        self._fits(payload, self.nbytes(shape, dtype))
        return CodedMessage(payload, self._code, numel_of(shape), wire_dtype(dtype))


class Int8(Quantiser):
    """Eight bits per entry: the nearest multiple of ``max |x|`` / 127 of its block.

    With B = ``block`` and c = (1 + 2^-7) / 254, ``alpha = (1 - c^2) / (1 + (B - 1) c^2)``: 0.9960 for B = 256. It
    sends 8 + numel + 2 ceil(numel / B) bytes, up to a multiple of 8. Entries of 1.5 * 2^127 = 2.6e38 (float64: 1.3e308)
    and more count as overflow.

    Args:
        block: entries, in row-major order, that share a unit.

    Raises:
        OutOfRange: block < 1.
    """

    name: ClassVar[str] = "int8"

    def __init__(self, block: int = INT8_BLOCK) -> None:
        super().__init__(codec("int8", block))


class Int4(Quantiser):
    """Four bits per entry: the nearest multiple of ``max |x|`` / 7 of its block.

    With B = ``block`` and c = (1 + 2^-7) / 14, ``alpha = (1 - c^2) / (1 + (B - 1) c^2)``: 0.857 for B = 32. It sends
    8 + ceil(numel / 2) + 2 ceil(numel / B) bytes, up to a multiple of 8. Entries of 1.5 * 2^127 = 2.6e38 (float64:
    1.3e308) and more count as overflow.

    Args:
        block: entries, in row-major order, that share a unit.

    Raises:
        OutOfRange: block < 1.
    """

    name: ClassVar[str] = "int4"

    def __init__(self, block: int = INT4_BLOCK) -> None:
        super().__init__(codec("int4", block))


class Sign(Quantiser):
    """One bit per entry, times the mean of ``|x|``. arXiv 1809.07599::

        C(x) = (||x||_1 / B) sign(x)        ||C(x) - x||^2 = ||x||^2 - ||x||_1^2 / B

    alpha = ||x||_1^2 / (B ||x||_2^2) >= 1/B, where B is the block, or numel; 1/B is what :meth:`alpha` says. For
    normally distributed entries it is 2/pi = 0.64. Zero cannot be sent: an entry that never has a gradient gets
    the mean, which only error feedback corrects.

    It sends 8 + ceil(numel / 8) + 4 ceil(numel / B) bytes, up to a multiple of 8. Entries of 1.5 * 2^127 = 2.6e38
    (float64: 1.3e308) and more count as overflow.

    Args:
        block: entries, in row-major order, that share a mean; None takes one mean for the whole tensor, as in the
            paper.

    Raises:
        OutOfRange: block < 1.
    """

    name: ClassVar[str] = "sign"

    def __init__(self, block: int | None = None) -> None:
        super().__init__(codec("sign", block))


class Natural(Quantiser):
    """Nine bits per entry: the nearest power of two. arXiv 1905.10988, without its randomness.

    An entry 2^e m, 1 <= m < 2, is off by at most m/3 of 2^e, so alpha = 8/9 (see the note on random rounding at
    :class:`outlast.comm.compressors.signs.Powers`). It sends 8 + numel + ceil(numel / 8) bytes, up to a multiple of 8.
    Entries of 1.5 * 2^127 = 2.6e38 (float64: 1.3e308) and more count as overflow.
    """

    name: ClassVar[str] = "natural"

    def __init__(self) -> None:
        super().__init__(codec("natural"))
