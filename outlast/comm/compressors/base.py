"""What a compressor is: a tensor to a payload of bytes and back.

A compressor C is *contractive*: E ||C(x) - x||^2 <= (1 - alpha) ||x||^2 with 0 < alpha <= 1, which is all that error
feedback asks of it. The size of a payload follows from the tensor's shape alone, so ranks exchange payloads without
first exchanging sizes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from outlast.comm import kernels
from outlast.errors import CommError

Shape = tuple[int, ...]
Slots = dict[str, Tensor]
"""Named tensors of state, owned by the caller."""

ALIGN_BYTES = 8


class Message(ABC):
    """A compressed tensor: its bytes, and how to add what they mean to another tensor.

    Args:
        payload: (nbytes,) uint8: what travels. The message may hold views of it.
    """

    def __init__(self, payload: Tensor) -> None:
        self.payload = payload

    @abstractmethod
    def add_to(self, out: Tensor, scale: float = 1.0) -> None:
        """``out += scale * C(x)`` in place; ``out`` is contiguous, of x's numel, and of the message's type and device.

        The result has the same bits wherever it is called: each entry gets one addition, or several in an order fixed
        by the payload.
        """

    @abstractmethod
    def finite(self) -> bool:
        """False if x held NaN or Inf, or if C(x) overflowed; cheap, because it looks only at what was sent."""


class DenseMessage(Message):
    """Every entry, in order.

    Args:
        payload: (nbytes,) uint8.
        values: x's numel entries, a view of the payload or decoded from it.
    """

    def __init__(self, payload: Tensor, values: Tensor) -> None:
        super().__init__(payload)
        self.values = values.view(-1)

    def add_to(self, out: Tensor, scale: float = 1.0) -> None:
        out.view(-1).add_(self.values, alpha=scale)

    def finite(self) -> bool:
        return finite(self.values)


class SparseMessage(Message):
    """Some entries, and their positions.

    Args:
        payload: (nbytes,) uint8.
        values: (k,) the entries sent.
        indices: (k,) int64, ascending, no index twice: their positions in the flat tensor.
    """

    def __init__(self, payload: Tensor, values: Tensor, indices: Tensor) -> None:
        super().__init__(payload)
        self.values = values
        self.indices = indices

    def add_to(self, out: Tensor, scale: float = 1.0) -> None:
        if kernels.handles(out):
            kernels.add_sparse(out, self.indices, self.values, scale)
        else:
            out.view(-1).index_add_(0, self.indices, self.values, alpha=scale)

    def finite(self) -> bool:
        return finite(self.values)


class Compressor(ABC):
    """A map of a tensor to bytes and back. It holds settings only.

    What it must remember about a tensor from step to step (the basis of a power iteration, a count of rounds) is in
    slots that the caller owns: :meth:`new_memory` makes them, :meth:`compress` takes them, and the caller saves them
    with its state. Receivers do not need them.
    """

    name: ClassVar[str]
    memory_slots: tuple[str, ...] = ()
    random: bool = False
    """Whether :meth:`alpha` holds on average over rounds, each with the memory that the last one left, rather than for
    every single round."""

    @abstractmethod
    def nbytes(self, shape: Shape, dtype: torch.dtype = torch.float32) -> int:
        """Exact size of a payload in bytes, including values, indices, scales, and padding to a multiple of 8.

        Args:
            shape: of the tensor; a tensor without entries has no bytes.
            dtype: of the tensor.
        """

    @abstractmethod
    def alpha(self, shape: Shape) -> float:
        """The contraction that holds for every tensor of ``shape``: E ||C(x) - x||^2 <= (1 - alpha) ||x||^2."""

    def typical_alpha(self, shape: Shape) -> float:
        """The contraction that settings go by: :meth:`alpha`, unless that is of a case that does not occur, as 1 / d of
        signs, which on normally distributed entries have 2 / pi."""
        return self.alpha(shape)

    def new_memory(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Slots:
        """The slots ``memory_slots`` for a tensor that was never compressed; the same on every rank."""
        return {}

    @abstractmethod
    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> Message:
        """C(x) as a message.

        Args:
            x: any shape and stride, read in row-major order; float64, or float32, bfloat16 or float16, which all
                travel as float32. It is not changed, and may be reused on return.
            out: (nbytes,) uint8, 8-byte aligned; the payload is written here and the message keeps it. None allocates
                it.
            memory: this tensor's slots, changed in place (others in the dict are not touched); None starts afresh.

        NaN and Inf are not refused here: they travel to the receivers, whose ``Message.finite`` is then False.

        Raises:
            CommError: x is of another type, or ``out`` of another size.
        """

    def compress_sum(self, x: Tensor, g: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> Message:
        """``x += g`` in place, then C(x), as :meth:`compress` returns it; some compressors take fewer passes.

        Args:
            x: contiguous, of a wire type.
            g: of x's shape, a float of x's type or smaller.
            out: see :meth:`compress`.
            memory: see :meth:`compress`.
        """
        return self.compress(x.add_(g), out, memory)

    @abstractmethod
    def open(self, payload: Tensor, shape: Shape, dtype: torch.dtype = torch.float32) -> Message:
        """The message whose bytes ``payload`` (nbytes,) uint8 holds; it may hold views of them.

        Raises:
            CommError: the payload has the wrong size for ``shape``.
        """

    def open_all(
        self, payloads: Sequence[Tensor], shape: Shape, dtype: torch.dtype = torch.float32
    ) -> Sequence[Message]:
        """:meth:`open` for several payloads of one shape, usually those of all ranks; some compressors do it at once.

        A subclass of such a compressor that overrides :meth:`open` must override this too; the conformance kit checks
        it.

        Raises:
            CommError: see :meth:`open`.
        """
        return [self.open(payload, shape, dtype) for payload in payloads]

    def add_to(self, out: Tensor, payload: Tensor, scale: float = 1.0) -> None:
        """``out += scale * C(x)`` for the x behind ``payload``; ``out`` is contiguous, of x's shape and wire type."""
        self.open(payload, tuple(out.shape), out.dtype).add_to(out, scale)

    def _room(self, x: Tensor, out: Tensor | None) -> Tensor:
        """The buffer for x's payload: ``out``, or a new one."""
        need = self.nbytes(tuple(x.shape), x.dtype)
        if out is None:
            return torch.empty(need, dtype=torch.uint8, device=x.device)
        self._fits(out, need)
        return out

    def _fits(self, payload: Tensor, need: int) -> None:
        if payload.dtype != torch.uint8 or payload.numel() != need:
            raise CommError(f"{self.name}: payload of {payload.numel()} x {payload.dtype}, expected {need} bytes")


def wire_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which a tensor is compressed and summed: float64 for float64, float32 for smaller floats.

    Raises:
        CommError: not a float.
    """
    if dtype == torch.float64:
        return torch.float64
    if dtype in (torch.float32, torch.bfloat16, torch.float16):
        return torch.float32
    raise CommError(f"cannot compress {dtype}", "use float64, float32, bfloat16 or float16")


def flat(x: Tensor) -> Tensor:
    """(numel,) contiguous, in row-major order, in the wire type; a view where possible."""
    return x.detach().reshape(-1).to(wire_dtype(x.dtype)).contiguous()


def finite(x: Tensor) -> bool:
    """Whether ``x`` holds neither NaN nor Inf.

    One pass in the common case: a NaN or Inf makes the sum NaN or Inf. The converse fails only where finite numbers
    overflow the sum, so a sum that is not finite is checked entry by entry.
    """
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def numel_of(shape: Shape) -> int:
    """Entries of a tensor of ``shape``."""
    return math.prod(shape)


def aligned(nbytes: int) -> int:
    """``nbytes`` up to the next multiple of 8."""
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
