"""Low rank: a matrix as the product of two thin ones."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from outlast.comm.compressors.base import (
    Compressor,
    DenseMessage,
    Message,
    Shape,
    Slots,
    aligned,
    finite,
    flat,
    numel_of,
    wire_dtype,
)
from outlast.comm.compressors.codecs import Exact
from outlast.comm.compressors.power_scale import (
    HEADER_BYTES,
    NOT_FINITE,
    exponent_for,
    largest_of,
    read_header,
    times_power,
    write_header,
)
from outlast.comm.compressors.select import select
from outlast.comm.compressors.value_codec import codec
from outlast.config import require
from outlast.errors import OutOfRange

LOWRANK_VALUES = ("fp32", "fp16", "bf16", "int8", "int4", "natural")
_NORMS = (2.0**-40, 2.0**40)
_SEED = 20_190_531


class LowRankMessage(Message):
    """P Q^T.

    Args:
        payload: (nbytes,) uint8.
        left: P^T, (rank, rows).
        right: Q^T, (rank, columns).
        exponent: the product is multiplied by 2^exponent; NOT_FINITE means NaN everywhere.
    """

    def __init__(self, payload: Tensor, left: Tensor, right: Tensor, exponent: int) -> None:
        super().__init__(payload)
        self._far = exponent
        if exponent not in (0, NOT_FINITE):
            # Half each: one factor alone might overflow where their product does not.
            left, right = times_power(left, exponent // 2), times_power(right, exponent - exponent // 2)
        self.left = left
        self.right = right

    def add_to(self, out: Tensor, scale: float = 1.0) -> None:
        if self._far == NOT_FINITE:
            out.add_(float("nan"))
            return
        out.view(self.left.shape[1], self.right.shape[1]).addmm_(self.left.t(), self.right, alpha=scale)

    def finite(self) -> bool:
        if self._far == NOT_FINITE or not (finite(self.left) and finite(self.right)):
            return False
        return self._far < 64 or finite(self.left.t() @ self.right)


class LowRank(Compressor):
    """Sends the product of two thin matrices: one step of power iteration, which continues from the last one.
    PowerSGD, arXiv 1905.13727, algorithm 1. ::

        M = x as (shape[0], everything else)        P = orthonormal(M B)        Q = M^T P        C(x) = P Q^T

    with B the basis (memory slot ``basis``, (columns, rank)), which becomes Q with normalised columns. It starts
    normally distributed, from the same seed on every rank. Orthonormal P comes from Householder's QR, which gives
    orthonormal columns for every M B, zero and rank-deficient ones included; M is brought into range by a power of two.

    If the two are not smaller than the tensor itself in float32, or rank >= min(rows, columns), as for vectors, the
    tensor is sent whole.

    Contraction: C(x) = P P^T M is a projection, so ``||x - C(x)||^2 = ||x||^2 - ||Q||^2``. How much that is depends on
    the spectrum and the basis; a basis orthogonal to M's rows captures nothing. The sender knows ||Q||^2 and
    ||x||^2. If the first is below ``alpha ||x||^2`` it sends, in the same form, the ``rank`` largest rows or columns,
    whichever are fewer. Hence for every x and every basis ::

        alpha = rank / min(rows, columns) * alpha_values

    since the r largest of m rows hold at least r / m of ||x||^2. For a basis drawn at random the same holds without
    that fallback on average: with sigma_i the singular values of M, the captured part is sum_i sigma_i^2 p_i, where
    p_i, the i-th diagonal entry of the projector, has an average that does not fall with sigma_i, and sum_i p_i = rank;
    so by Chebyshev's inequality for sums the average is at least rank / min(m, n) ||x||^2. Gradients of networks do far
    better.

    With values other than fp32, P' is P as receivers read it, Q the least-squares fit to it, M^T P' (P'^T P')^-1, and
    Q' is Q as receivers read it. Then ||x - P' Q'^T||^2 = ||x||^2 - ||P' Q^T||^2 + ||P' (Q - Q')^T||^2, which is what
    the sender compares. In the fallback one factor holds unit vectors, which each codec writes up to a factor that the
    other factor makes up for, so only alpha_values is lost.

    Payload: 8 bytes (see :mod:`outlast.comm.compressors.power_scale`), P^T, Q^T.

    Args:
        rank: columns of P and Q.
        values: how P and Q are written: ``fp32`` (as they are, float64 too), ``fp16``, ``bf16``, ``int8``, ``int4`` or
            ``natural``.

    Raises:
        OutOfRange: a value out of range.
    """

    name: ClassVar[str] = "lowrank"
    memory_slots = ("basis",)

    def __init__(self, rank: int, *, values: str = "fp32") -> None:
        require(rank >= 1, "rank", rank, "rank >= 1")
        if values == "sign":
            raise OutOfRange("values = 'sign' cannot write the zeros of a unit vector", f"one of {LOWRANK_VALUES}")
        self.rank = rank
        self._code = codec(values)

    def nbytes(self, shape: Shape, dtype: torch.dtype = torch.float32) -> int:
        dtype = wire_dtype(dtype)
        if self._whole(shape):
            return aligned(numel_of(shape) * dtype.itemsize)
        return HEADER_BYTES + sum(self._parts(shape, dtype))

    def alpha(self, shape: Shape) -> float:
        if self._whole(shape):
            return 1.0
        rows, columns = _matrix(shape)
        return self._code.alpha(self.rank * max(rows, columns)) * self.rank / min(rows, columns)

    def new_memory(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Slots:
        return {"basis": _start(_matrix(shape)[1], self.rank, wire_dtype(dtype), device)}

    def compress(self, x: Tensor, out: Tensor | None = None, memory: Slots | None = None) -> Message:
        payload = self._room(x, out)
        shape = tuple(x.shape)
        x = flat(x)
        if self._whole(shape):
            values = payload[: x.numel() * x.element_size()].view(x.dtype)
            values.copy_(x)
            payload[x.numel() * x.element_size() :].zero_()
            return DenseMessage(payload, values)
        rows, columns = _matrix(shape)
        energy, exponent = float(torch.linalg.vector_norm(x)) ** 2, 0
        if not _NORMS[0] <= math.sqrt(energy) <= _NORMS[1]:
            x, exponent = _in_range(x)
            energy = 0.0 if exponent == NOT_FINITE else float(torch.linalg.vector_norm(x)) ** 2
        write_header(payload, exponent)
        parts = payload[HEADER_BYTES:]
        if energy == 0.0:
            parts.zero_()
            return self.open(payload, shape, x.dtype)
        matrix = x.view(rows, columns)
        basis = memory["basis"] if memory is not None else _start(columns, self.rank, x.dtype, x.device)
        left, right = torch.split(parts, self._parts(shape, x.dtype))
        kept, right_factor = self._iterate(matrix, basis, left, right)
        if not kept >= self.alpha(shape) * energy:
            right_factor = self._largest(matrix, left, right)
        if memory is not None:
            lengths = torch.linalg.vector_norm(right_factor, dim=1)
            alive = lengths > 0
            basis.t()[alive] = right_factor[alive] / lengths[alive, None]
        return self.open(payload, shape, x.dtype)

    def open(self, payload: Tensor, shape: Shape, dtype: torch.dtype = torch.float32) -> Message:
        self._fits(payload, self.nbytes(shape, dtype))
        dtype = wire_dtype(dtype)
        if self._whole(shape):
            return DenseMessage(payload, payload[: numel_of(shape) * dtype.itemsize].view(dtype))
        sides = zip(torch.split(payload[HEADER_BYTES:], self._parts(shape, dtype)), _matrix(shape), strict=True)
        left, right = (self._read(part, side, dtype) for part, side in sides)
        return LowRankMessage(payload, left, right, read_header(payload))

    def _parts(self, shape: Shape, dtype: torch.dtype) -> list[int]:
        """Bytes of P and Q."""
        return [self._code.nbytes(self.rank * side, dtype) for side in _matrix(shape)]

    def _whole(self, shape: Shape) -> bool:
        """Decided as for float32, so that a shape is sent the same way in every type."""
        factors = HEADER_BYTES + sum(self._parts(shape, torch.float32))
        return self.rank >= min(_matrix(shape)) or factors >= 4 * numel_of(shape)

    def _write(self, factor: Tensor, part: Tensor) -> Tensor:
        """Writes P^T or Q^T, and returns it as receivers read it."""
        self._code.write(factor.contiguous().view(-1), part)
        return self._read(part, factor.shape[1], factor.dtype)

    def _read(self, part: Tensor, side: int, dtype: torch.dtype) -> Tensor:
        # A copy: rounding of a product may depend on how its factors are aligned in memory, and copies are aligned
        # alike.
        return self._code.read(part, self.rank * side, dtype).clone().view(self.rank, side)

    def _iterate(self, matrix: Tensor, basis: Tensor, left: Tensor, right: Tensor) -> tuple[float, Tensor]:
        """The captured part of ||x||^2, and Q^T."""
        # The product takes a quarter of the time if the thin factor is stored by columns, not by rows.
        thin = basis.t().contiguous().t()
        p = self._write(torch.linalg.qr(matrix @ thin).Q.t(), left)
        q = p @ matrix
        if isinstance(self._code, Exact):
            return float(torch.linalg.vector_norm(self._write(q, right))) ** 2, q
        gram = p @ p.t()
        q, failed = torch.linalg.solve_ex(gram, q)
        if int(failed):
            return 0.0, q
        lost = q - self._write(q, right)
        return float(((gram @ q) * q).sum() - ((gram @ lost) * lost).sum()), q

    def _largest(self, matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """The largest rows or columns, whichever are fewer; returns Q^T."""
        rows, columns = matrix.shape
        side = 1 if rows <= columns else 0
        chosen = select(torch.linalg.vector_norm(matrix, dim=side).contiguous(), self.rank, "exact")
        unit = matrix.new_zeros(self.rank, min(rows, columns))
        unit[torch.arange(self.rank, device=matrix.device), chosen] = 1
        if rows <= columns:
            factor = float(self._write(unit, left)[0, chosen[0]])
            q = matrix[chosen] / factor
            self._write(q, right)
            return q
        factor = float(self._write(unit, right)[0, chosen[0]])
        self._write(matrix[:, chosen].t() / factor, left)
        return unit


def _matrix(shape: Shape) -> tuple[int, int]:
    """(rows, columns)."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _start(columns: int, rank: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(columns, rank), the same on every rank."""
    drawn = torch.randn(columns, rank, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)
    return drawn.to(dtype).to(device)


def _in_range(x: Tensor) -> tuple[Tensor, int]:
    """x times a power of two, with its largest entry in [1, 2), and the exponent to undo that."""
    largest = largest_of(x)
    exponent = exponent_for(largest, x.dtype)
    if exponent == NOT_FINITE or largest == 0:
        return x, exponent
    exponent = math.frexp(largest)[1] - 1
    return times_power(x, -exponent), exponent
