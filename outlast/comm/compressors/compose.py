"""Compressors made of compressors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from outlast.comm.compressors.base import Compressor, Message, Shape, Slots, flat, wire_dtype
from outlast.comm.compressors.lowrank import LowRank
from outlast.comm.compressors.quantise import Int4, Int8
from outlast.comm.compressors.topk import TopK
from outlast.config import require
from outlast.errors import OutOfRange


class SumMessage(Message):
    """The sum of messages, added one after the other.

    Args:
        payload: (nbytes,) uint8: the parts' payloads, end to end.
        parts: what is summed.
    """

    def __init__(self, payload: Tensor, parts: Sequence[Message]) -> None:
        super().__init__(payload)
        self.parts = parts

    def add_to(self, out: Tensor, scale: float = 1.0) -> None:
        for part in self.parts:
            part.add_to(out, scale)

    def finite(self) -> bool:
        return all(part.finite() for part in self.parts)


class Sum(Compressor):
    """Several compressors, each of which compresses what the previous ones left; the message is the sum. ::

        r_0 = x        m_i = C_i(r_{i-1})        r_i = r_{i-1} - m_i        C(x) = m_1 + m_2 + ...

    The final remainder is C(x) - x, so ``1 - alpha`` is the product of the parts' ``1 - alpha_i``.

    Payload: the parts' payloads, in order. Memory: the parts' slots; that of the i-th part, counted from 0, is named
    ``i.slot``.

    Args:
        parts: at least one.

    Raises:
        OutOfRange: no parts.
    """

    name: ClassVar[str] = "sum"

    def __init__(self, *parts: Compressor) -> None:
        if not parts:
            raise OutOfRange("Sum() has no parts", "give at least one compressor")
        self.parts = parts
        self.memory_slots = tuple(_slot(i, slot) for i, part in enumerate(parts) for slot in part.memory_slots)
        self.random = any(part.random for part in parts)

    def nbytes(self, shape: Shape, dtype: torch.dtype = torch.float32) -> int:
        return sum(self._sizes(shape, dtype))

    def alpha(self, shape: Shape) -> float:
        left = 1.0
        for part in self.parts:
            left *= 1 - part.alpha(shape)
        return 1 - left

    def new_memory(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Slots:
        return {
            _slot(i, slot): tensor
            for i, part in enumerate(self.parts)
            for slot, tensor in part.new_memory(shape, dtype, device).items()
        }

    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> SumMessage:
        payload = self._room(x, out)
        shape = tuple(x.shape)
        left = flat(x).clone().view(shape)
        messages: list[Message] = []
        for i, (part, room) in enumerate(self._split(payload, shape, x.dtype)):
            slots = None if memory is None else {slot: memory[_slot(i, slot)] for slot in part.memory_slots}
            messages.append(part.compress(left, room, slots))
            if i + 1 < len(self.parts):
                messages[i].add_to(left, -1.0)
        return SumMessage(payload, messages)

    def open(self, payload: Tensor, shape: Shape, dtype: torch.dtype = torch.float32) -> SumMessage:
        self._fits(payload, self.nbytes(shape, dtype))
        return SumMessage(payload, [part.open(room, shape, dtype) for part, room in self._split(payload, shape, dtype)])

    def _sizes(self, shape: Shape, dtype: torch.dtype) -> list[int]:
        return [part.nbytes(shape, wire_dtype(dtype)) for part in self.parts]

    def _split(self, payload: Tensor, shape: Shape, dtype: torch.dtype) -> list[tuple[Compressor, Tensor]]:
        return list(zip(self.parts, torch.split(payload, self._sizes(shape, dtype)), strict=True))


class Gear(Sum):
    """Outliers, integers, and a low-rank correction for what these miss. GEAR, arXiv 2403.05527, section 3. ::

        C(x) = S + D + L,    S = Top-k of x,    D = blockwise integers of x - S,    L = low rank of x - S - D

    The paper compresses a transformer's cached keys and values this way, with the outliers of each row or column; here
    they are those of the whole tensor. ``1 - alpha`` is the product of the three parts' ``1 - alpha_i``
    (:class:`TopK`, :class:`Int4` or :class:`Int8`, :class:`LowRank`).

    Args:
        density: share of entries sent as outliers.
        rank: of L.
        bits: of D, 4 or 8.
        block: entries that share a unit in D; None takes 32 for 4 bits and 256 for 8.
        values: how the outliers, P and Q are written, as in :class:`LowRank`.
        selection: of the outliers, as in :class:`TopK`.

    Raises:
        OutOfRange: a value out of range.
    """

    name: ClassVar[str] = "gear"

    def __init__(
        self,
        density: float = 0.01,
        rank: int = 4,
        *,
        bits: int = 4,
        block: int | None = None,
        values: str = "fp32",
        selection: str = "auto",
    ) -> None:
        require(bits in (4, 8), "bits", bits, "4 or 8")
        quantiser = {4: Int4, 8: Int8}[bits]
        super().__init__(
            TopK(density, selection=selection, values=values),
            quantiser() if block is None else quantiser(block),
            LowRank(rank, values=values),
        )


def _slot(part: int, slot: str) -> str:
    return f"{part}.{slot}"
