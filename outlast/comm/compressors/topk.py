"""Top-k: the entries of largest magnitude, of the whole tensor or of each block."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from outlast.comm import kernels
from outlast.comm.compressors.base import Compressor, Message, Shape, Slots, flat, numel_of, wire_dtype
from outlast.comm.compressors.codecs import Codec
from outlast.comm.compressors.select import select, select_in_blocks
from outlast.comm.compressors.sparse import open_sparse, open_sparse_rows, sparse_nbytes, write_sparse
from outlast.comm.compressors.value_codec import codec
from outlast.comm.config import SELECTIONS
from outlast.config import nearest, require
from outlast.errors import OutOfRange


class _Selection(Compressor):
    """Some entries and their indices: the payload that :class:`TopK` and :class:`BlockTopK` share."""

    _code: Codec

    @abstractmethod
    def count(self, numel: int) -> int:
        """How many of ``numel`` entries are sent."""

    def nbytes(self, shape: Shape, dtype: torch.dtype = torch.float32) -> int:
        numel = numel_of(shape)
        return sparse_nbytes(self._code, self.count(numel), numel, wire_dtype(dtype))

    def open(self, payload: Tensor, shape: Shape, dtype: torch.dtype = torch.float32) -> Message:
        self._fits(payload, self.nbytes(shape, dtype))
        numel = numel_of(shape)
        return open_sparse(self._code, payload, self.count(numel), numel, wire_dtype(dtype))

    def open_all(
        self, payloads: Sequence[Tensor], shape: Shape, dtype: torch.dtype = torch.float32
    ) -> Sequence[Message]:
        for payload in payloads:
            self._fits(payload, self.nbytes(shape, dtype))
        numel = numel_of(shape)
        return open_sparse_rows(self._code, payloads, self.count(numel), numel, wire_dtype(dtype))


class TopK(_Selection):
    """Sends the k entries of largest magnitude, with their indices.

    Payload: the values, as ``values`` says; then the indices, in the smallest of three forms (see
    :mod:`outlast.comm.compressors.indices`): at a density of 1 % an index takes 8.6 bits, at 5 % 6.3 bits.

    Contraction: ``alpha = k / numel * alpha_values``, with alpha_values = 1 for fp32. Proof: let T be the selected
    entries and Q(T) what is sent. T and the rest of x have no entry in common, so ::

        ||x - Q(T)||^2 = ||x - T||^2 + ||T - Q(T)||^2
                      <= ||x||^2 - ||T||^2 + (1 - alpha_values) ||T||^2 = ||x||^2 - alpha_values ||T||^2

    and ||T||^2 >= k / numel ||x||^2. That is the worst case, all entries equal; gradients are far from it.

    Args:
        density: share of entries sent; k = ceil(density * numel). Give this or ``k``.
        k: entries sent of every tensor (all, if it has fewer).
        selection: ``exact``, ``sampled`` or ``auto``; same result, different speed. ``sampled`` estimates the k-th
            magnitude from a fixed strided sample, aims a little below, and ranks exactly among the entries above;
            if they are fewer than k it ranks the whole tensor instead.
        values: how the selected values are written: ``fp32`` (unchanged, float64 too), ``fp16``, ``bf16``, ``int8``,
            ``int4``, ``natural`` or ``sign`` (one magnitude for all: arXiv 1903.02891).
        block: selected entries, in order of their indices, that share a unit (int8: default 256, int4: 32) or a
            mean (sign: all).

    Raises:
        OutOfRange: not exactly one of density and k, or a value out of range.
    """

    name: ClassVar[str] = "topk"

    def __init__(
        self,
        density: float | None = None,
        *,
        k: int | None = None,
        selection: str = "auto",
        values: str = "fp32",
        block: int | None = None,
    ) -> None:
        if (density is None) == (k is None):
            raise OutOfRange(f"TopK(density={density}, k={k})", "give exactly one of density and k")
        if density is not None:
            require(0 < density <= 1, "density", density, "0 < density <= 1")
        if k is not None:
            require(k >= 1, "k", k, "k >= 1")
        if selection not in SELECTIONS:
            raise OutOfRange(f"selection = {selection!r} is not known", nearest(selection, SELECTIONS))
        self.density = density
        self.k = k
        self.selection = selection
        self._code = codec(values, block)

    def count(self, numel: int) -> int:
        if self.k is not None:
            return min(self.k, numel)
        assert self.density is not None
        return count_of(self.density, numel)

    def alpha(self, shape: Shape) -> float:
        numel = numel_of(shape)
        k = self.count(numel)
        return self._code.alpha(k) * k / numel if numel else 1.0

    def typical_alpha(self, shape: Shape) -> float:
        numel = numel_of(shape)
        k = self.count(numel)
        return self._code.typical_alpha(k) * k / numel if numel else 1.0

    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> Message:
        payload = self._room(x, out)
        x = flat(x)
        numel, k = x.numel(), self.count(x.numel())
        if k == numel:
            return write_sparse(self._code, x, None, numel, payload)
        if kernels.handles(x):
            indices, chosen = kernels.select(x, k, self.selection)
        else:
            indices = select(x, k, self.selection)
            chosen = torch.index_select(x, 0, indices)
        return write_sparse(self._code, chosen, indices, numel, payload)

    def compress_sum(self, x: Tensor, g: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> Message:
        numel, k = x.numel(), self.count(x.numel())
        if k == numel or not kernels.handles(x):
            return super().compress_sum(x, g, out, memory)
        payload = self._room(x, out)
        indices, values = kernels.select(x, k, self.selection, plus=g.contiguous())
        return write_sparse(self._code, values, indices, numel, payload)


class BlockTopK(_Selection):
    """Sends the k entries of largest magnitude of each block of B entries, with their indices.

    This needs no threshold for the whole tensor, and no part of the tensor waits for long. The price is that entries of
    blocks with small entries are sent in place of larger ones elsewhere. An incomplete last block sends min(k, its
    size).

    Payload as :class:`TopK`. ``alpha = k / B * alpha_values``, at least ``density * alpha_values``: the proof there,
    block by block.

    Args:
        density: share of entries sent; k = ceil(density * B).
        block: B, entries of a block, in row-major order; None takes B = floor(1 / density) and so k = 1, which is
            several times as fast as larger k.
        values: how the selected values are written, as in :class:`TopK`.

    Raises:
        OutOfRange: a value out of range.
    """

    name: ClassVar[str] = "block-topk"

    def __init__(self, density: float, *, block: int | None = None, values: str = "fp32") -> None:
        require(0 < density <= 1, "density", density, "0 < density <= 1")
        if block is not None:
            require(block >= 1, "block", block, "block >= 1")
        self.density = density
        self.block = block or math.floor(1 / density + 1e-6)
        self.k = count_of(density, self.block)
        self._code = codec(values)

    def count(self, numel: int) -> int:
        return numel // self.block * self.k + min(self.k, numel % self.block)

    def alpha(self, shape: Shape) -> float:
        numel = numel_of(shape)
        return self._code.alpha(self.count(numel)) * self.k / self.block if numel else 1.0

    def typical_alpha(self, shape: Shape) -> float:
        numel = numel_of(shape)
        return self._code.typical_alpha(self.count(numel)) * self.k / self.block if numel else 1.0

    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> Message:
        payload = self._room(x, out)
        x = flat(x)
        if self.count(x.numel()) == x.numel():
            return write_sparse(self._code, x, None, x.numel(), payload)
        indices = select_in_blocks(x, self.k, self.block)
        return write_sparse(self._code, torch.index_select(x, 0, indices), indices, x.numel(), payload)


def count_of(density: float, numel: int) -> int:
    """ceil(density * numel), at least 1 where there is an entry."""
    # The small term keeps 0.07 * 100 = 7.000000000000001 from becoming 8.
    return min(numel, max(1, math.ceil(density * numel - 1e-6)))
