"""The conformance kit: passes what keeps the contract, and refuses, naming the clause, each way of breaking it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from outlast.comm.compressors import (
    COMPRESSORS,
    BlockTopK,
    Compressor,
    Dense,
    DenseMessage,
    Int8,
    LowRank,
    Message,
    RandK,
    Shape,
    Sign,
    Slots,
    SparseMessage,
    Sum,
    TopK,
    make_compressor,
)
from outlast.comm.compressors.base import flat, numel_of
from outlast.comm.testing import DTYPES, ContractViolation, check_compressor

FEW = (torch.float32,)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_compressor_keeps_the_contract(name: str) -> None:
    """Types other than float32 in turn, one for each; the property tests draw all."""
    dtype = DTYPES[1 + COMPRESSORS.index(name) % 3]
    check_compressor(make_compressor(name, density=0.05, rank=2), dtypes=(torch.float32, dtype), rounds=60)


def test_one_call_is_enough() -> None:
    check_compressor(TopK(0.05))


@pytest.mark.parametrize(
    "compressor",
    [
        TopK(0.05, values="fp16"),
        TopK(0.05, values="int8"),
        TopK(0.05, values="int4"),
        TopK(0.05, values="sign"),
        BlockTopK(0.05, block=64, values="natural"),
        LowRank(2, values="int8"),
        Sign(64),
        Sum(LowRank(2), TopK(0.02)),
        Sum(RandK(0.5), RandK(0.2)),
    ],
    ids=lambda c: c.name,
)
def test_variants_keep_the_contract(compressor: Compressor) -> None:
    check_compressor(compressor, dtypes=FEW, rounds=60)


class WrongSize(Dense):
    def nbytes(self, shape: Shape, dtype: torch.dtype = torch.float32) -> int:
        return super().nbytes(shape, dtype) + 8 * bool(numel_of(shape))

    def _room(self, x: Tensor, out: Tensor | None) -> Tensor:
        return super()._room(x, out)[8:] if out is None else super()._room(x, out)


class Unaligned(Dense):
    def nbytes(self, shape: Shape, dtype: torch.dtype = torch.float32) -> int:
        return 4 * numel_of(shape)


class SizeByType(Dense):
    def nbytes(self, shape: Shape, dtype: torch.dtype = torch.float32) -> int:
        return -(-numel_of(shape) * dtype.itemsize // 8) * 8


class BytesForNothing(Dense):
    def nbytes(self, shape: Shape, dtype: torch.dtype = torch.float32) -> int:
        return super().nbytes(shape, dtype) or 8


class DropsNaN(Dense):
    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> DenseMessage:
        return super().compress(x.nan_to_num(0.0), out)


class TellsSenderOnly(Dense):
    def open(self, payload: Tensor, shape: Shape, dtype: torch.dtype = torch.float32) -> DenseMessage:
        message = super().open(payload, shape, dtype)
        message.finite = lambda: True  # type: ignore[method-assign]
        return message


class L2Sign(Dense):
    """sign(x) ||x||_2 / sqrt(numel): not contractive on heavy tails."""

    def alpha(self, shape: Shape) -> float:
        return 1 / max(numel_of(shape), 1)

    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> DenseMessage:
        wide = flat(x).double()
        length = (wide / wide.abs().max()).norm() * wide.abs().max() if wide.any() else wide.new_zeros(())
        scaled = torch.where(wide < 0, -1.0, 1.0) * length / math.sqrt(max(len(wide), 1))
        return super().compress((scaled + 0 * wide).to(flat(x).dtype).view(x.shape), out)


class Boastful(TopK):
    def alpha(self, shape: Shape) -> float:
        return min(1.0, 1.5 * super().alpha(shape))


class NoAlpha(Dense):
    def alpha(self, shape: Shape) -> float:
        return 0.0


class Scaled(RandK):
    """Rand-k made unbiased, which is not contractive."""

    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> Message:
        return super().compress(x * 10, out, memory)


class ChangesInput(Dense):
    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> DenseMessage:
        message = super().compress(x, out)
        x.clamp_(-100, 100)
        return message


class Fickle(Dense):
    calls = 0

    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> DenseMessage:
        message = super().compress(x, out)
        self.calls += 1
        if message.values.numel() > 1:
            message.values[self.calls % message.values.numel()] *= 1 + 1e-6
        return message


class LeavesBytes(Dense):
    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> DenseMessage:
        payload = torch.zeros(self.nbytes(tuple(x.shape), x.dtype), dtype=torch.uint8) if out is None else out
        keep = payload.clone()
        message = super().compress(x, payload)
        payload[x.numel() * message.values.itemsize :] = keep[x.numel() * message.values.itemsize :]
        return message


class KeepsMore(Int8):
    """The sender subtracts what it had before rounding."""

    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> Any:
        message = super().compress(x, out)
        exact = DenseMessage(message.payload, flat(x).clone())
        return exact if message.finite() else message


class NotLinear(SparseMessage):
    def add_to(self, out: Tensor, scale: float = 1.0) -> None:
        super().add_to(out, abs(scale))


class AddsMagnitude(TopK):
    def open(self, payload: Tensor, shape: Shape, dtype: torch.dtype = torch.float32) -> Message:
        return self._spoilt(super().open(payload, shape, dtype))

    def open_all(self, payloads: Sequence[Tensor], shape: Shape, dtype: torch.dtype = torch.float32) -> list[Message]:
        return [self._spoilt(message) for message in super().open_all(payloads, shape, dtype)]

    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> Message:
        return self._spoilt(super().compress(x, out))

    def _spoilt(self, message: Message) -> Message:
        if isinstance(message, SparseMessage):
            return NotLinear(message.payload, message.values, message.indices)
        return message


class Forgets(LowRank):
    """Slots of another name than those declared."""

    memory_slots = ("base",)


class OwnDraw(RandK):
    def new_memory(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Slots:
        return {"round": torch.randint(2**40, (1,), device=device)}


class Replaces(RandK):
    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> Message:
        if memory is not None:
            memory["round"] = memory["round"].clone()
        return super().compress(x, out, memory)


class Meddles(Dense):
    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> DenseMessage:
        for slot in (memory or {}).values():
            slot.zero_()
        return super().compress(x, out)


class Remembers(Dense):
    """Memory of its own, in place of slots: the second rank to decode gets other numbers."""

    last: Tensor | None = None

    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> DenseMessage:
        last = self.last if self.last is not None and self.last.shape == x.shape else torch.zeros_like(x)
        self.last = x.clone()
        return super().compress(x + last.nan_to_num(0.0).to(x.dtype), out)


class ReadsStorage(Dense):
    """Takes the storage for the tensor."""

    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> DenseMessage:
        if x.dim() == 2 and not x.is_contiguous():
            x = torch.as_strided(x, x.shape, (x.shape[1], 1))
        return super().compress(x, out)


class FirstOfAll(Dense):
    def open_all(self, payloads: Sequence[Tensor], shape: Shape, dtype: torch.dtype = torch.float32) -> list[Message]:
        first = self.open(payloads[0].clone().fill_(1), shape, dtype)
        return [first, *(self.open(payload, shape, dtype) for payload in payloads[1:])]


class AnySize(Dense):
    def _fits(self, payload: Tensor, need: int) -> None:
        pass


class ValueErrors(Dense):
    def _fits(self, payload: Tensor, need: int) -> None:
        if payload.numel() != need:
            raise ValueError(need)


class TakesIntegers(Dense):
    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> DenseMessage:
        return super().compress(x if x.is_floating_point() else x.float(), out)


@pytest.mark.parametrize(
    ("broken", "clause"),
    [
        (WrongSize(), "size"),
        (Unaligned(), "alignment"),
        (BytesForNothing(), "size"),
        (DropsNaN(), "finite"),
        (TellsSenderOnly(), "finite"),
        (L2Sign(), "contraction"),
        (Boastful(0.05), "contraction"),
        (Scaled(0.1), "contraction"),
        (NoAlpha(), "alpha"),
        (ChangesInput(), "input"),
        (Fickle(), "deterministic"),
        (LeavesBytes(), "deterministic"),
        (Remembers(), "deterministic"),
        (KeepsMore(), "receiver"),
        (FirstOfAll(), "receiver"),
        (AddsMagnitude(0.05), "linear"),
        (Forgets(2), "memory"),
        (OwnDraw(0.1), "memory"),
        (Replaces(0.1), "memory"),
        (Meddles(), "memory"),
        (ReadsStorage(), "stride"),
        (AnySize(), "refusal"),
        (ValueErrors(), "refusal"),
        (TakesIntegers(), "type"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Compressor) else value,
)
def test_what_breaks_the_contract_is_refused(broken: Compressor, clause: str) -> None:
    with pytest.raises(ContractViolation) as caught:
        check_compressor(broken, dtypes=FEW, rounds=50)
    assert caught.value.clause == clause, caught.value
    assert broken.name in caught.value.case
    assert str(caught.value).startswith(f"{clause}: {broken.name}, ")


def test_a_size_that_depends_on_the_type_is_refused() -> None:
    with pytest.raises(ContractViolation, match="in the type it travels in") as caught:
        check_compressor(SizeByType(), dtypes=(torch.bfloat16,))
    assert caught.value.clause == "size"


class ShortIndices(TopK):
    """Sends indices as uint16: right up to 2^16 entries."""

    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> Message:
        cut = x.clone()
        cut.view(-1)[1 << 16 :] = 0
        message = super().compress(cut, out, memory)
        super().compress(x)  # what x is refused for, is refused
        return message


class Stumbles(Dense):
    """Takes more than 2^17 entries for an error of its own."""

    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> DenseMessage:
        if x.numel() > 1 << 17:
            raise IndexError("index out of range")
        return super().compress(x, out, memory)


def test_large_tensors_are_tried() -> None:
    with pytest.raises(ContractViolation, match=r"contraction: .*last input, \(300, 303\)"):
        check_compressor(ShortIndices(0.01), dtypes=FEW)


def test_an_error_of_its_own_is_a_violation() -> None:
    with pytest.raises(ContractViolation, match=r"raises: .*\(140001,\) float32: IndexError: index out") as caught:
        check_compressor(Stumbles(), dtypes=FEW)
    assert isinstance(caught.value.__cause__, IndexError)
