"""Comparing two committed steps, bit by bit and by how much; one rank's state of each is in memory at a time."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from outlast.checkpoint.format.dtypes import DISGUISED, dtype_name
from outlast.checkpoint.format.json_values import to_json
from outlast.checkpoint.state.nested import leaves
from outlast.checkpoint.tools.open_step import OpenedStep

_BLOCK = 1 << 20
"""Elements compared at a time; limits the memory that the comparison itself needs."""


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that differs between the steps."""

    name: str
    """Keys joined by ``/``; for local state without the rank."""
    rank: int | None
    """The rank whose local state it is part of; None for replicated state."""
    kind: Literal["only in a", "only in b", "shape", "dtype", "content"]
    """The first of these that differs."""
    shape_a: tuple[int, ...] | None
    """None if step a does not have the tensor; likewise the next three."""
    dtype_a: str | None
    shape_b: tuple[int, ...] | None
    dtype_b: str | None
    differing: int | None
    """Number of elements whose bits differ or, if the dtypes differ, whose values do. None unless the shapes are equal;
    likewise the next two."""
    max_abs: float | None
    """Largest ``|a - b|``; infinite if only one of two elements is finite, or only one is NaN."""
    relative_l2: float | None
    """``|a - b|₂ / |a|₂``; infinite if a is zero and b is not, or if ``max_abs`` is infinite."""


@dataclass(frozen=True)
class ValueDifference:
    """One JSON value that differs between the steps; ``1``, ``1.0`` and ``true`` differ, NaN equals NaN."""

    name: str
    """Keys joined by ``/``; for local state without the rank."""
    rank: int | None
    """The rank whose local state it is part of; None for replicated state."""
    kind: Literal["only in a", "only in b", "content"]
    a: Any
    """None if step a does not have the value; ``kind`` distinguishes that from a stored None."""
    b: Any


@dataclass(frozen=True)
class Comparison:
    """How two steps differ, in the replicated state and every rank's local state."""

    url_a: str
    """Of the step's folder."""
    url_b: str
    step_a: int
    step_b: int
    world_size_a: int
    world_size_b: int
    tensors: tuple[TensorDifference, ...]
    values: tuple[ValueDifference, ...]
    equal_tensors: tuple[tuple[int | None, str], ...]
    """Rank and name of each tensor that is equal in dtype, shape and every bit."""
    equal_values: tuple[tuple[int | None, str], ...]

    @property
    def equal(self) -> bool:
        """Whether both hold the same state. Step numbers, dates and attempts are not compared."""
        return not self.tensors and not self.values and self.world_size_a == self.world_size_b


def diff(
    url_a: str | os.PathLike[str],
    url_b: str | os.PathLike[str],
    step_a: int | None = None,
    step_b: int | None = None,
) -> Comparison:
    """Compare two steps (None: the newest committed one there); every byte of both is verified as it is read.

    Raises:
        CheckpointNotFound: a step does not exist.
        CorruptCheckpoint, IncompleteCheckpoint, UnknownFormatVersion: names the file.
        CheckpointError: a storage cannot be read.
    """
    tensors: list[TensorDifference] = []
    values: list[ValueDifference] = []
    equal_tensors: list[tuple[int | None, str]] = []
    equal_values: list[tuple[int | None, str]] = []
    with OpenedStep(url_a, step_a) as a, OpenedStep(url_b, step_b, "--other-step") as b:
        for rank in (None, *range(max(a.world_size, b.world_size))):
            state_a, state_b = (_leaves(opened, rank) for opened in (a, b))
            # A tensor in one and a value in the other count as two: each is in only one of the steps.
            for path, is_tensor in sorted(state_a.keys() | state_b.keys()):
                leaf_a, leaf_b = state_a.pop((path, is_tensor), _ABSENT), state_b.pop((path, is_tensor), _ABSENT)
                name = "/".join(path)
                if is_tensor:
                    tensor_difference = _compare_tensors(name, rank, leaf_a, leaf_b)
                    tensors += tensor_difference
                    equal_tensors += [] if tensor_difference else [(rank, name)]
                else:
                    value_difference = _compare_values(name, rank, leaf_a, leaf_b)
                    values += value_difference
                    equal_values += [] if value_difference else [(rank, name)]
        return Comparison(
            a.url,
            b.url,
            a.step,
            b.step,
            a.world_size,
            b.world_size,
            tuple(tensors),
            tuple(values),
            tuple(equal_tensors),
            tuple(equal_values),
        )


_ABSENT: Any = object()


def _leaves(opened: OpenedStep, rank: int | None) -> dict[tuple[tuple[str, ...], bool], Any]:
    """Tensors and values, by their keys and whether they are tensors."""
    if rank is not None and rank >= opened.world_size:
        return {}
    return {(path, isinstance(value, torch.Tensor)): value for path, value in leaves(opened.load(rank))}


def _compare_values(name: str, rank: int | None, a: Any, b: Any) -> list[ValueDifference]:
    if a is _ABSENT:
        return [ValueDifference(name, rank, "only in b", None, b)]
    if b is _ABSENT:
        return [ValueDifference(name, rank, "only in a", a, None)]
    texts = [json.dumps(to_json(value, name), sort_keys=True) for value in (a, b)]
    return [] if texts[0] == texts[1] else [ValueDifference(name, rank, "content", a, b)]


def _compare_tensors(name: str, rank: int | None, a: Any, b: Any) -> list[TensorDifference]:
    shape_a, dtype_a = (None, None) if a is _ABSENT else (tuple(a.shape), dtype_name(a.dtype))
    shape_b, dtype_b = (None, None) if b is _ABSENT else (tuple(b.shape), dtype_name(b.dtype))
    kind: Literal["only in a", "only in b", "shape", "dtype", "content"]
    amounts: tuple[int | None, float | None, float | None] = (None, None, None)
    if shape_a is None or shape_b is None:
        kind = "only in b" if shape_a is None else "only in a"
    elif shape_a != shape_b:
        kind = "shape"
    else:
        kind = "dtype" if dtype_a != dtype_b else "content"
        if kind == "content" and torch.equal(_bytes(a), _bytes(b)):
            return []
        amounts = _amounts(a.reshape(-1), b.reshape(-1))
    return [TensorDifference(name, rank, kind, shape_a, dtype_a, shape_b, dtype_b, *amounts)]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _amounts(a: torch.Tensor, b: torch.Tensor) -> tuple[int, float, float]:
    """Of two flat tensors: differing elements, largest absolute difference, relative L2 norm of the difference."""
    differing, largest, squares, squares_a = 0, 0.0, 0.0, 0.0
    for start in range(0, len(a), _BLOCK):
        x, y = a[start : start + _BLOCK], b[start : start + _BLOCK]
        numbers = _numbers(x)
        distance = _distance(x, y, numbers)
        unlike = _bits(x) != _bits(y) if a.dtype == b.dtype else (distance != 0).reshape(-1, 1)
        differing += int(np.count_nonzero(unlike.any(axis=1)))
        with np.errstate(over="ignore"):  # infinity is the right answer to an overflow
            largest = max(largest, float(distance.max()))
            squares += float(np.sum(distance**2))
            squares_a += float(np.sum(np.abs(numbers[np.isfinite(numbers)]) ** 2))
    if not squares:
        return differing, largest, 0.0
    infinite = math.isinf(squares) or not squares_a
    return differing, largest, math.inf if infinite else math.sqrt(squares / squares_a)


def _distance(x: torch.Tensor, y: torch.Tensor, numbers: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    """``|x - y|`` elementwise; 0 for equal infinities and two NaNs, infinite for one NaN."""
    if x.dtype == y.dtype and x.dtype in (torch.int64, torch.uint64):
        # In float64, neighbours above 2**53 would be equal; modulo 2**64 the difference is exact.
        high, low = np.maximum(x.numpy(), y.numpy()), np.minimum(x.numpy(), y.numpy())
        exact: npt.NDArray[np.float64] = (high.view(np.uint64) - low.view(np.uint64)).astype(np.float64)
        return exact
    others = _numbers(y)
    with np.errstate(invalid="ignore", over="ignore"):
        distance: npt.NDArray[np.float64] = np.abs(numbers - others).astype(np.float64)
    alike = (numbers == others) | (np.isnan(numbers) & np.isnan(others))
    distance[alike] = 0.0
    distance[np.isnan(distance)] = math.inf
    return distance


def _numbers(flat: torch.Tensor) -> npt.NDArray[Any]:
    array = (flat.float() if flat.dtype in DISGUISED else flat).numpy()
    numbers: npt.NDArray[Any] = array.astype(np.complex128 if flat.is_complex() else np.float64)
    return numbers


def _bits(flat: torch.Tensor) -> npt.NDArray[Any]:
    """The bits of each element, as a row of unsigned integers."""
    raw = _bytes(flat).numpy()
    width = min(flat.element_size(), 8)
    return raw.view(np.dtype(f"u{width}")).reshape(len(flat), -1)
