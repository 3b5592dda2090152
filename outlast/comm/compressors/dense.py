"""The compressor that sends everything."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from outlast.comm.compressors.base import (
    Compressor,
    DenseMessage,
    Shape,
    Slots,
    aligned,
    flat,
    numel_of,
    wire_dtype,
)


class Dense(Compressor):
    """Sends every entry; alpha = 1."""

    name: ClassVar[str] = "dense"

    def nbytes(self, shape: Shape, dtype: torch.dtype = torch.float32) -> int:
        return aligned(numel_of(shape) * wire_dtype(dtype).itemsize)

    def alpha(self, shape: Shape) -> float:
        return 1.0

    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> DenseMessage:
        payload = self._room(x, out)
        x = flat(x)
        values = payload[: x.numel() * x.dtype.itemsize].view(x.dtype)
        values.copy_(x)
        payload[x.numel() * x.element_size() :].zero_()
        return DenseMessage(payload, values)

    def open(self, payload: Tensor, shape: Shape, dtype: torch.dtype = torch.float32) -> DenseMessage:
        self._fits(payload, self.nbytes(shape, dtype))
        dtype = wire_dtype(dtype)
        return DenseMessage(payload, payload[: numel_of(shape) * dtype.itemsize].view(dtype))
