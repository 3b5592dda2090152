"""Checks any compressor against the contract of :class:`outlast.comm.compressors.Compressor`, in one call::

    from outlast.comm.compressors import TopK
    from outlast.comm.testing import check_compressor

    def test_top_k():
        check_compressor(TopK(0.01))

A violation raises :class:`ContractViolation`, which names the clause, the input and the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from outlast.comm.compressors.base import ALIGN_BYTES, Compressor, Message, Shape, Slots, numel_of, wire_dtype
from outlast.errors import CommError

LARGE: tuple[Shape, ...] = ((300, 303), (140_001,))
"""More than 2^16 and more than 2^17 entries: an index or a count of 16 bits ends there, and blocks of payload begin."""
SHAPES: tuple[Shape, ...] = ((24, 40), (5, 6, 17), (257,), (7,), (1,), (), (0,), (0, 3), (1, 300), (300, 1))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_HUGE = {torch.float32: 1e37, torch.bfloat16: 1e37, torch.float16: 6e4, torch.float64: 1e300}
_TINY = {torch.float32: 1e-40, torch.bfloat16: 1e-40, torch.float16: 1e-7, torch.float64: 1e-310}
_EVERYWHERE = ("normal", "constant", "zero", "huge", "tiny")
_LARGE_KINDS = ("normal", "last")
_AVERAGED = ("normal", "heavy-tailed", "constant", "sparse")
_SMALLEST = {torch.float32: 2.0**-149, torch.float64: 2.0**-1074}


class ContractViolation(AssertionError):
    """A compressor breaks the contract.

    Args:
        clause: the broken one: ``size``, ``alignment``, ``alpha``, ``contraction``, ``finite``, ``input``,
            ``deterministic``, ``receiver``, ``linear``, ``memory``, ``stride``, ``type``, ``refusal``, ``raises``.
        case: the compressor and the input.
        what: what was seen.
    """

    def __init__(self, clause: str, case: str, what: str) -> None:
        super().__init__(f"{clause}: {case}: {what}")
        self.clause = clause
        self.case = case
        self.what = what


def check_compressor(
    compressor: Compressor,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    seed: int = 0,
    rounds: int = 200,
    device: torch.device | str = "cpu",
) -> None:
    """Check a compressor against every clause of the contract, on inputs of all kinds.

    The inputs are normal, heavy-tailed (Cauchy), constant, alternating, sparse, zero, huge (1e37; float64: 1e300), tiny
    (1e-40, not normal; float64: 1e-310) and not contiguous, of one to three dimensions, one entry, none, and more than
    2^16 and 2^17 entries (the first of ``dtypes`` alone). The clauses:

    ``size``
        A payload is uint8, of ``nbytes(shape, dtype)`` bytes, the same for all types that travel as float32, and every
        byte of it is written; a tensor without entries has none.
    ``alignment``
        Sizes are multiples of 8.
    ``alpha``, ``contraction``
        0 < alpha <= 1 and ||C(x) - x|| <= sqrt(1 - alpha) ||x||, with 1e-5 ||x|| and one smallest number per entry
        allowed for rounding. Every round; or, where ``random`` says so, on average over ``rounds`` rounds, with four
        standard errors allowed.
    ``finite``
        ``Message.finite`` is False, at the sender and at the receiver, for NaN and both Inf at any place, and True for
        inputs above.
    ``input``
        The input is unchanged, bit for bit.
    ``deterministic``
        The same input and memory give the same bytes and the same memory.
    ``receiver``
        What ``open`` makes of the bytes adds, bit for bit, what the sender's message adds, without memory, also from a
        payload in the midst of others; ``open_all`` of several makes the same of each.
    ``linear``
        ``add_to(out, scale)`` adds scale times C(x).
    ``memory``
        ``new_memory`` makes the slots of ``memory_slots``, the same each time; ``compress`` changes them in place, and
        no others; without memory it does as with new memory.
    ``stride``
        Strides do not matter.
    ``type``, ``refusal``
        A tensor of integers, an ``out`` of another size and a payload of another size raise CommError.

    ``raises``
        Nothing else is raised, whatever the input; the error is the violation's cause.

    Args:
        compressor: to check; its settings stay as they are.
        dtypes: of the inputs.
        seed: of the inputs.
        rounds: over which random compressors are averaged.
        device: of the inputs.

    Raises:
        ContractViolation: the first clause found broken.
    """
    at = _At(compressor.name)
    try:
        _check_all(compressor, dtypes, seed, rounds, torch.device(device), at)
    except ContractViolation:
        raise
    except Exception as error:
        raise ContractViolation("raises", at.case, f"{type(error).__name__}: {error}") from error


@dataclass(slots=True)
class _At:
    """What is being checked, for errors of the compressor's own."""

    case: str


def _check_all(
    compressor: Compressor, dtypes: Sequence[torch.dtype], seed: int, rounds: int, device: torch.device, at: _At
) -> None:
    for dtype in dtypes:
        for shape in (*SHAPES, *(LARGE if dtype == dtypes[0] else ())):
            at.case = f"{compressor.name}, {shape} {str(dtype).removeprefix('torch.')}"
            _Shaped(compressor, shape, dtype, device).check()
            for kind, x in _on(device, inputs(shape, dtype, seed)):
                # Numbers of every kind in one shape, and in every shape some, of which more in float32.
                case = _Case(compressor, kind, x)
                at.case = case.what
                if shape == SHAPES[0]:
                    case.check(rounds=3)
                elif shape in LARGE:
                    if kind in _LARGE_KINDS:
                        case.check(rounds=1)
                elif kind in _EVERYWHERE[: None if dtype == torch.float32 else 2]:
                    case.check(rounds=1)
        at.case = f"{compressor.name}, strides and NaN in {str(dtype).removeprefix('torch.')}"
        _check_strides(compressor, dtype, seed, device)
        _check_not_finite(compressor, dtype, seed, device)
    if compressor.random:
        for kind, x in _on(device, inputs(SHAPES[0], dtypes[0], seed)):
            if kind in _AVERAGED:
                case = _Case(compressor, kind, x)
                at.case = case.what
                case.check_average(rounds)


def inputs(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """(kind, tensor) of every kind."""
    generator = torch.Generator().manual_seed(seed)
    wide = wire_dtype(dtype)
    limit = torch.finfo(dtype).max / 16

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=wide)

    alternating = torch.ones(numel_of(shape), dtype=wide)
    alternating[1::2] = -1
    sparse = normal() * (torch.rand(shape, generator=generator) < 0.05)
    kinds: dict[str, Tensor] = {
        "normal": normal(),
        "heavy-tailed": (normal() / normal()).clamp(-limit, limit),
        "constant": torch.full(shape, -0.37, dtype=wide),
        "alternating": alternating.view(shape),
        "sparse": sparse,
        "zero": torch.zeros(shape, dtype=wide),
        "huge": normal().clamp(-4, 4) * (_HUGE[dtype] / 4),
        "tiny": normal() * _TINY[dtype],
        "mixed magnitudes": normal() * torch.exp2(40 * torch.rand(shape, generator=generator, dtype=wide) - 20),
    }
    if (
        numel_of(shape) > 1 << 16
    ):  # all that is large is in the last entries, and small enough to be forgotten elsewhere
        last = normal() * 1e-3
        last.view(-1)[-8:] = 1.0
        kinds["last"] = last
    for kind, x in kinds.items():
        yield kind, x.clamp(-limit * 8, limit * 8).to(dtype)


def _on(device: torch.device, pairs: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((kind, x.to(device)) for kind, x in pairs)


class _Shaped:
    """What holds for a shape, whatever the numbers."""

    def __init__(self, compressor: Compressor, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.compressor = compressor
        self.device = device
        self.shape = shape
        self.dtype = dtype
        self.what = f"{compressor.name}, {tuple(shape)} {str(dtype).removeprefix('torch.')}"

    def check(self) -> None:
        compressor, shape, dtype = self.compressor, self.shape, self.dtype
        nbytes = compressor.nbytes(shape, dtype)
        _hold(isinstance(nbytes, int) and nbytes >= 0, "size", self.what, f"nbytes is {nbytes!r}")
        _hold(nbytes % ALIGN_BYTES == 0, "alignment", self.what, f"{nbytes} bytes, no multiple of {ALIGN_BYTES}")
        _hold(nbytes == 0 or numel_of(shape) > 0, "size", self.what, f"{nbytes} bytes for no entries")
        whole = compressor.nbytes(shape, wire_dtype(dtype))
        _hold(nbytes == whole, "size", self.what, f"{nbytes} bytes, but {whole} in the type it travels in")
        alpha = compressor.alpha(shape)
        _hold(0 < alpha <= 1, "alpha", self.what, f"alpha is {alpha}, not in (0, 1]")
        first, second = (compressor.new_memory(shape, dtype, self.device) for _ in range(2))
        named = f"{sorted(first)}, and memory_slots {sorted(compressor.memory_slots)}"
        _hold(set(first) == set(compressor.memory_slots), "memory", self.what, f"new_memory makes {named}")
        _hold(_same_slots(first, second), "memory", self.what, "new_memory is not the same twice")
        _hold(
            not {t.data_ptr() for t in first.values() if t.numel()} & {t.data_ptr() for t in second.values()},
            "memory",
            self.what,
            "new_memory gives out the same tensor twice",
        )
        x = torch.zeros(shape, dtype=dtype, device=self.device)
        for wrong in (nbytes + ALIGN_BYTES, nbytes - ALIGN_BYTES):
            if wrong < 0:
                continue
            room = torch.zeros(wrong, dtype=torch.uint8, device=self.device)
            _raises(partial(compressor.open, room, shape, dtype), self.what, f"open of {wrong} bytes")
            _raises(partial(compressor.compress, x, room), self.what, f"compress into {wrong} bytes")
        _raises(partial(compressor.compress, x.to(torch.int64)), self.what, "compress of int64", "type")


class _Case:
    """One input."""

    def __init__(self, compressor: Compressor, kind: str, x: Tensor) -> None:
        self.compressor = compressor
        self.x = x
        self.shape: Shape = tuple(x.shape)
        self.wire = wire_dtype(x.dtype)
        self.what = f"{compressor.name}, {kind} input, {self.shape} {str(x.dtype).removeprefix('torch.')}"

    def hold(self, held: bool, clause: str, what: str) -> None:
        _hold(held, clause, self.what, what)

    def check(self, rounds: int) -> None:
        compressor, x = self.compressor, self.x
        memory = compressor.new_memory(self.shape, x.dtype, x.device)
        for index in range(rounds):
            before, slots = x.clone(), _copied(memory)
            message = compressor.compress(x, None, memory)
            self.hold(isinstance(message, Message), "type", f"compress gives {type(message).__name__}, no Message")
            self.hold(_same(x, before), "input", "changed by compress")
            self.check_payload(message)
            self.check_repeats(message, slots, memory, first=index == 0)
            self.hold(message.finite(), "finite", "finite() is False")
            sent = self.check_receiver(message)
            self.hold(_same(x, before), "input", "changed by add_to")
            if not compressor.random:
                self.check_contraction(sent)

    def check_payload(self, message: Message) -> None:
        need, payload = self.compressor.nbytes(self.shape, self.x.dtype), message.payload
        self.hold(payload.dtype == torch.uint8, "size", f"payload is {payload.dtype}")
        self.hold(payload.numel() == need, "size", f"payload has {payload.numel()} bytes, nbytes says {need}")

    def check_repeats(self, message: Message, before: Slots, after: Slots, first: bool) -> None:
        """Once more from the memory as it was, among other slots, into the midst of a buffer."""
        compressor, x, need = self.compressor, self.x, message.payload.numel()
        slots = _copied(before)
        other = torch.arange(3.0, device=x.device)
        shared = slots | {"not mine": other.clone()}
        places = {name: slot.data_ptr() for name, slot in slots.items()}
        buffer = torch.full((need + 2 * ALIGN_BYTES,), 0xA5, dtype=torch.uint8, device=x.device)
        room = buffer[ALIGN_BYTES : ALIGN_BYTES + need]
        again = compressor.compress(x, room, shared)
        inside = need == 0 or again.payload.data_ptr() == room.data_ptr()
        self.hold(inside, "size", "the payload is not in the out it was given")
        around = torch.cat((buffer[:ALIGN_BYTES], buffer[ALIGN_BYTES + need :]))
        self.hold(bool((around == 0xA5).all()), "size", "wrote outside of the out it was given")
        same = torch.equal(room, message.payload)
        self.hold(same, "deterministic", "the same input and memory give other bytes, or bytes are left unwritten")
        held = {name: slot for name, slot in shared.items() if name != "not mine"}
        intact = set(held) == set(before) and _same(shared["not mine"], other)
        self.hold(intact, "memory", "compress touches slots that are not its own")
        stays = all(held[name].data_ptr() == place for name, place in places.items())
        self.hold(stays, "memory", "compress replaces a slot, in place of changing it in place")
        self.hold(_same_slots(held, after), "deterministic", "the same input and memory leave another memory")
        if first:
            anew = compressor.compress(x).payload
            self.hold(torch.equal(anew, message.payload), "memory", "without memory it does not do as with new memory")

    def check_receiver(self, message: Message) -> Tensor:
        """What was sent."""
        compressor, shape = self.compressor, self.shape
        payload = message.payload
        buffer = torch.zeros(payload.numel() + ALIGN_BYTES, dtype=torch.uint8, device=payload.device)
        buffer[ALIGN_BYTES:] = payload
        opened = compressor.open(buffer[ALIGN_BYTES:], shape, self.wire)
        self.hold(opened.finite(), "finite", "finite() is False at the receiver")
        pair = compressor.open_all([payload, buffer[ALIGN_BYTES:]], shape, self.wire)
        self.hold(len(pair) == 2, "receiver", f"open_all makes {len(pair)} messages of 2 payloads")
        start = torch.linspace(-1, 1, numel_of(shape), dtype=self.wire, device=payload.device).view(shape)
        sent = torch.zeros(shape, dtype=self.wire, device=payload.device)
        message.add_to(sent)
        for out, scale in ((torch.zeros_like(start), 1.0), (start, -1.0), (start, 1 / 3)):
            mine, theirs, third = out.clone(), out.clone(), out.clone()
            message.add_to(mine, scale)
            opened.add_to(theirs, scale)
            compressor.add_to(third, payload, scale)
            where = f"what is added with scale {scale:.3g} to {'numbers' if out is start else 'zero'}"
            self.hold(_same(mine, theirs), "receiver", f"{where} is not, bit for bit, what the sender adds")
            self.hold(_same(theirs, third), "receiver", f"{where} by Compressor.add_to is not what open adds")
            for one in pair:
                fourth = out.clone()
                one.add_to(fourth, scale)
                self.hold(_same(theirs, fourth), "receiver", f"{where} after open_all is not what open adds")
            expected = out.double() + scale * sent.double()
            slack = 1e-5 if self.wire == torch.float32 else 1e-13
            allowed = slack * (out.double().abs() + sent.double().abs() + _largest(sent)) + 4 * _SMALLEST[self.wire]
            linear = bool(((mine.double() - expected).abs() <= allowed).all())
            self.hold(linear, "linear", f"{where} is not scale times what is added with scale 1")
        return sent

    def check_contraction(self, sent: Tensor) -> None:
        error, norm, slack = self._error(sent)
        alpha = self.compressor.alpha(self.shape)
        self.hold(
            error <= math.sqrt(1 - alpha) * norm + slack,
            "contraction",
            f"||C(x) - x|| is {error / norm if norm else error:.6g} ||x||, "
            f"above sqrt(1 - alpha) = {math.sqrt(1 - alpha):.6g}",
        )

    def check_average(self, rounds: int) -> None:
        """The contraction, on average over rounds."""
        compressor, x = self.compressor, self.x
        memory = compressor.new_memory(self.shape, x.dtype, x.device)
        ratios = []
        for _ in range(rounds):
            message = compressor.compress(x, None, memory)
            sent = torch.zeros(self.shape, dtype=self.wire, device=x.device)
            message.add_to(sent)
            error, norm, slack = self._error(sent)
            if norm == 0:
                self.hold(error <= slack, "contraction", f"C(0) has norm {error:.6g}")
                return
            ratios.append((max(error - slack, 0.0) / norm) ** 2)
        sample = torch.tensor(ratios, dtype=torch.float64)
        mean, deviation = float(sample.mean()), float(sample.std()) / math.sqrt(rounds)
        bound = 1 - compressor.alpha(self.shape)
        self.hold(
            mean <= bound + 4 * deviation,
            "contraction",
            f"E||C(x) - x||^2 is {mean:.6g} ||x||^2 over {rounds} rounds, above 1 - alpha = {bound:.6g}",
        )

    def _error(self, sent: Tensor) -> tuple[float, float, float]:
        """(||C(x) - x||, ||x||, what rounding may add), all over max |x|, so that squares are numbers."""
        wide = self.x.double()
        unit = _largest(wide) or 1.0
        error = float(((sent.double() - wide) / unit).norm())
        norm = float((wide / unit).norm())
        smallest = _SMALLEST[self.wire]
        return error, norm, 1e-5 * norm + math.sqrt(wide.numel()) * (smallest / unit)


def _check_strides(compressor: Compressor, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    x = torch.randn(30, 40, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    for what, y in {
        "transposed": x.t(),
        "every other row": x[::2, 1:],
        "every third": x.view(-1)[::3],
        "expanded": x[:1].expand(9, 40),
        "offset": x.view(-1)[1:],
    }.items():
        before = y.clone()
        payload = compressor.compress(y).payload
        straight = compressor.compress(y.clone(memory_format=torch.contiguous_format)).payload
        case = f"{compressor.name}, {what} input, {str(dtype).removeprefix('torch.')}"
        _hold(torch.equal(payload, straight), "stride", case, "other bytes than from a contiguous copy")
        _hold(_same(y, before), "input", case, "changed by compress")


def _check_not_finite(compressor: Compressor, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(seed)
    for shape in ((24, 40), (300,), (1,)):
        numel = numel_of(shape)
        for value in (math.nan, math.inf, -math.inf):
            anywhere = int(torch.randint(numel, (1,), generator=generator))
            for place in sorted({0, numel // 2, numel - 1, anywhere}):
                x = torch.randn(numel, generator=generator).to(device, dtype)
                x[place] = value
                x = x.view(shape)
                case = f"{compressor.name}, {value} at entry {place} of {shape} {str(dtype).removeprefix('torch.')}"
                memory = compressor.new_memory(shape, dtype, x.device)
                message = compressor.compress(x, None, memory)
                _hold(not message.finite(), "finite", case, "finite() is True at the sender")
                opened = compressor.open(message.payload.clone(), shape, wire_dtype(dtype))
                _hold(not opened.finite(), "finite", case, "finite() is True at the receiver")


def _hold(held: bool, clause: str, case: str, what: str) -> None:
    if not held:
        raise ContractViolation(clause, case, what)


def _raises(call: Callable[[], object], case: str, what: str, clause: str = "refusal") -> None:
    try:
        call()
    except CommError:
        return
    except (RuntimeError, ValueError, TypeError) as error:
        raise ContractViolation(clause, case, f"{what} raises {type(error).__name__}, not CommError") from error
    raise ContractViolation(clause, case, f"{what} does not raise CommError")


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _copied(slots: Slots) -> Slots:
    return {name: slot.clone() for name, slot in slots.items()}


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, so that NaN equals itself and 0 does not equal -0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))


def _same_slots(a: Slots, b: Slots) -> bool:
    return set(a) == set(b) and all(_same(a[name], b[name]) for name in a)
