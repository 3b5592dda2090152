"""Codecs: a flat tensor of n numbers to bytes, in few bits per number.

Quantising compressors are made of them, and sparse and low-rank ones write their numbers with them. Each
states alpha: ||Q(x) - x||^2 <= (1 - alpha) ||x||^2 for every x of n numbers, in the arithmetic of real numbers; the
result, rounded to the type of x, is off by at most another half unit in the last place of each entry.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from outlast.comm.compressors.base import aligned, finite
from outlast.comm.compressors.power_scale import (
    HEADER_BYTES,
    NOT_FINITE,
    exponent_for,
    largest_of,
    read_header,
    times_power,
    write_header,
)


class Codec(ABC):
    """n numbers to bytes and back."""

    name: str

    @abstractmethod
    def nbytes(self, n: int, dtype: torch.dtype) -> int:
        """Bytes of n numbers of ``dtype`` (float32 or float64), a multiple of 8; none for n = 0."""

    @abstractmethod
    def alpha(self, n: int) -> float:
        """The contraction that holds for any n numbers."""

    def typical_alpha(self, n: int) -> float:
        """The contraction of n normally distributed numbers, where it is known; else :meth:`alpha`."""
        return self.alpha(n)

    @abstractmethod
    def write(self, x: Tensor, out: Tensor) -> None:
        """Write x (n,), contiguous, to out (nbytes,) uint8, 8-byte aligned."""

    @abstractmethod
    def add_to(self, payload: Tensor, out: Tensor, scale: float) -> None:
        """``out += scale * Q(x)``, out (n,) contiguous."""

    @abstractmethod
    def finite(self, payload: Tensor, n: int, dtype: torch.dtype) -> bool:
        """False if x held NaN or Inf, or was too large to be written."""

    def read(self, payload: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        """Q(x), (n,); maybe a view of the payload."""
        out = torch.zeros(n, dtype=dtype, device=payload.device)
        self.add_to(payload, out, 1.0)
        return out

    def read_rows(self, payloads: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        """As :meth:`read`, of each row of (rows, nbytes): (rows, n)."""
        return torch.stack([self.read(row, n, dtype) for row in payloads])


class Exact(Codec):
    """Numbers as they are; alpha = 1."""

    name = "fp32"

    def nbytes(self, n: int, dtype: torch.dtype) -> int:
        return aligned(n * dtype.itemsize)

    def alpha(self, n: int) -> float:
        return 1.0

    def write(self, x: Tensor, out: Tensor) -> None:
        self.read(out, x.numel(), x.dtype).copy_(x)
        out[x.numel() * x.element_size() :].zero_()

    def add_to(self, payload: Tensor, out: Tensor, scale: float) -> None:
        out.add_(self.read(payload, out.numel(), out.dtype), alpha=scale)

    def finite(self, payload: Tensor, n: int, dtype: torch.dtype) -> bool:
        return finite(self.read(payload, n, dtype))

    def read(self, payload: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        return payload[: n * dtype.itemsize].view(dtype)


class Scaled(Codec):
    """Base of codecs that work in the range of :mod:`outlast.comm.compressors.power_scale`: a header of eight bytes,
    then the body."""

    def nbytes(self, n: int, dtype: torch.dtype) -> int:
        return HEADER_BYTES + aligned(self._body_bytes(n)) if n else 0

    def write(self, x: Tensor, out: Tensor) -> None:
        if not x.numel():
            return
        maxima = self._maxima(x)
        exponent = self._exponent(float(maxima.max()), x.dtype)
        out[-8:].zero_()  # padding
        write_header(out, exponent)
        body = out[HEADER_BYTES:]
        if exponent == NOT_FINITE:
            body.zero_()
            return
        if exponent or x.dtype != torch.float32:
            x = times_power(x, -exponent).to(torch.float32)
            maxima = self._maxima(x)
        self._write(x, maxima, body)

    def add_to(self, payload: Tensor, out: Tensor, scale: float) -> None:
        if not out.numel():
            return
        exponent = read_header(payload)
        body = payload[HEADER_BYTES:]
        if exponent == NOT_FINITE:
            out.add_(float("nan"))
        elif exponent == 0 and out.dtype == torch.float32:
            self._add(body, out, scale)
        else:
            decoded = torch.zeros(out.numel(), dtype=torch.float32, device=out.device)
            self._add(body, decoded, 1.0)
            out.add_(times_power(decoded.to(out.dtype), exponent).mul_(scale))

    def finite(self, payload: Tensor, n: int, dtype: torch.dtype) -> bool:
        return n == 0 or read_header(payload) != NOT_FINITE

    def _exponent(self, largest: float, dtype: torch.dtype) -> int:
        """The exponent of the power of two to take out of x."""
        return exponent_for(largest, dtype)

    def _maxima(self, x: Tensor) -> Tensor:
        """Largest |x| of the whole or of each part; NaN if there is one."""
        return x.new_tensor([largest_of(x)])

    @abstractmethod
    def _body_bytes(self, n: int) -> int:
        """Bytes of n numbers without header and padding."""

    @abstractmethod
    def _write(self, x: Tensor, maxima: Tensor, body: Tensor) -> None:
        """Write x (n,) float32, which is in range."""

    @abstractmethod
    def _add(self, body: Tensor, out: Tensor, scale: float) -> None:
        """``out += scale * Q(x)``, out (n,) float32."""


class Half(Scaled):
    """Two bytes per number: ``fp16`` (alpha = 1 - 2^-22) or ``bf16`` (alpha = 1 - 2^-16).

    Rounding to nearest, with u = 2^-11 (fp16) or 2^-8 (bf16), is off by at most u / (1 + u) of each number that is
    normal after scaling. For fp16 the largest is scaled to [2^14, 2^15), so a number that is not normal, below 2^-14,
    is off by at most 2^-25: of all n at most n * 2^-50 in the square, n * 2^-78 of the largest's. For bf16 that is less
    by far. Hence 1 - alpha <= (u / (1 + u))^2 + n * 2^-78, which is below u^2 for n < 2^46.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._shift = 14 if dtype == torch.float16 else 0
        self.name = "fp16" if dtype == torch.float16 else "bf16"

    def alpha(self, n: int) -> float:
        return 1 - 2.0 ** (-22 if self._dtype == torch.float16 else -16)

    def _exponent(self, largest: float, dtype: torch.dtype) -> int:
        exponent = exponent_for(largest, dtype)
        if self._shift and largest > 0 and exponent != NOT_FINITE:
            return math.frexp(largest)[1] - 1 - self._shift
        return exponent

    def _body_bytes(self, n: int) -> int:
        return 2 * n

    def _write(self, x: Tensor, maxima: Tensor, body: Tensor) -> None:
        body[: 2 * x.numel()].view(self._dtype).copy_(x)

    def _add(self, body: Tensor, out: Tensor, scale: float) -> None:
        values = body[: 2 * out.numel()].view(self._dtype).to(torch.float32)
        out.add_(values if scale == 1.0 else values.mul_(scale))
