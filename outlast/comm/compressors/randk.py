"""Rand-k: entries drawn at random, the same on every rank."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from outlast.comm.compressors.base import Compressor, Message, Shape, Slots, finite, flat, numel_of, wire_dtype
from outlast.comm.compressors.sparse import coded_message
from outlast.comm.compressors.topk import count_of
from outlast.comm.compressors.value_codec import codec
from outlast.config import require

_KEY_BYTES = 8
_GOLDEN = 0x9E3779B97F4A7C15


class RandK(Compressor):
    """Sends k entries drawn at random, as they are. Of their positions only the seed travels.

    The draw follows from ``seed`` and from the tensor's number of rounds (memory slot ``round``, (1,) int64), so all
    ranks draw the same entries, and others in each round. The tensor is rotated by a random distance and cut into k
    runs of entries, as equal as possible, and one entry is drawn from each run. So each entry is drawn with probability
    k / numel: with s_i the length of run i, an entry is in it with
    probability s_i / numel, and is drawn from it with 1 / s_i, which summed over the k runs is k / numel.

    Contraction, on average over rounds: ``alpha = k / numel * alpha_values``, because E||x - C(x)||^2 is
    (1 - k / numel) ||x||^2 + E||T - Q(T)||^2 with T the drawn entries. The values are not scaled by numel / k: that
    would be unbiased, but not contractive.

    Payload: the seed of the draw, 8 bytes, and k values.

    Args:
        density: share of entries sent; k = ceil(density * numel).
        values: how the values are written, as in :class:`~outlast.comm.compressors.TopK`.
        seed: of all draws; the same on every rank.

    Raises:
        OutOfRange: a value out of range.
    """

    name: ClassVar[str] = "randk"
    memory_slots = ("round",)
    random = True

    def __init__(self, density: float, *, values: str = "fp32", seed: int = 0) -> None:
        require(0 < density <= 1, "density", density, "0 < density <= 1")
        self.density = density
        self.seed = seed
        self._code = codec(values)

    def count(self, numel: int) -> int:
        """How many of ``numel`` entries are sent."""
        return count_of(self.density, numel)

    def nbytes(self, shape: Shape, dtype: torch.dtype = torch.float32) -> int:
        numel = numel_of(shape)
        return _KEY_BYTES + self._code.nbytes(self.count(numel), wire_dtype(dtype)) if numel else 0

    def alpha(self, shape: Shape) -> float:
        numel = numel_of(shape)
        k = self.count(numel)
        return self._code.alpha(k) * k / numel if numel else 1.0

    def typical_alpha(self, shape: Shape) -> float:
        numel = numel_of(shape)
        k = self.count(numel)
        return self._code.typical_alpha(k) * k / numel if numel else 1.0

    def new_memory(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Slots:
        return {"round": torch.zeros(1, dtype=torch.int64, device=device)}

    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> Message:
        payload = self._room(x, out)
        x = flat(x)
        if not x.numel():
            return self._message(payload, 0, x.dtype, None)
        rounds = int(memory["round"]) if memory is not None else 0
        key = _mix(_mix(self.seed) + rounds)
        payload[:_KEY_BYTES].view(torch.int64).fill_(_signed(key))
        indices = draw(key, self.count(x.numel()), x.numel(), x.device)
        values = torch.index_select(x, 0, indices)
        if not finite(x):
            values[0] = float("nan")  # else a NaN that was not drawn would go unnoticed
        self._code.write(values, payload[_KEY_BYTES:])
        if memory is not None:
            memory["round"] += 1
        return self._message(payload, x.numel(), x.dtype, indices)

    def open(self, payload: Tensor, shape: Shape, dtype: torch.dtype = torch.float32) -> Message:
        self._fits(payload, self.nbytes(shape, dtype))
        numel = numel_of(shape)
        if not numel:
            return self._message(payload, 0, wire_dtype(dtype), None)
        key = int(payload[:_KEY_BYTES].view(torch.int64))
        indices = draw(key, self.count(numel), numel, payload.device)
        return self._message(payload, numel, wire_dtype(dtype), indices)

    def _message(self, payload: Tensor, numel: int, dtype: torch.dtype, indices: Tensor | None) -> Message:
        k = self.count(numel)
        return coded_message(self._code, payload, payload[_KEY_BYTES if numel else 0 :], k, numel, dtype, indices)


def draw(key: int, k: int, numel: int, device: torch.device) -> Tensor:
    """(k,) int64, ascending, no index twice. It uses integers only, so the result is the same everywhere."""
    if k == numel:
        return torch.arange(numel, device=device)
    run = torch.arange(k + 1, device=device)
    starts = (run * numel).div_(k, rounding_mode="floor")
    sizes = starts.diff()
    high = _shifted(_mixed(run[1:] * _signed(_GOLDEN) + _signed(key % 2**64)), 32)
    # High half of the product of 32 random bits and a length: uniform up to length / 2^32.
    indices = starts[:-1] + (high * sizes >> 32)
    # Number 0 of the random stream; the runs took the numbers from 1 on.
    rotation = (_mix((key - _GOLDEN) % 2**64) >> 32) * numel >> 32
    cut = int(torch.searchsorted(indices, numel - rotation))
    return torch.cat((indices[cut:] - (numel - rotation), indices[:cut] + rotation))


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's output function (Steele et al., OOPSLA 2014) for int64, with products modulo 2^64."""
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _mix(z: int) -> int:
    """As :func:`_mixed`, for one number, after a step of the generator."""
    z = (z + _GOLDEN) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def _shifted(z: Tensor, by: int) -> Tensor:
    """Logical shift to the right, as if unsigned."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(z: int) -> int:
    return z - 2**64 if z >= 2**63 else z
