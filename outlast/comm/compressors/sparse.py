"""Shared by sparse compressors: from k numbers and their places to a payload, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outlast.comm.compressors import host
from outlast.comm.compressors import indices as index_codec
from outlast.comm.compressors.base import DenseMessage, Message, SparseMessage, aligned
from outlast.comm.compressors.codecs import Codec, Exact


class CodedSparseMessage(SparseMessage):
    """A sparse message whose values were rounded; the codec tells whether it is finite."""

    def __init__(self, payload: Tensor, values: Tensor, indices: Tensor, finite: bool) -> None:
        super().__init__(payload, values, indices)
        self._finite = finite

    def finite(self) -> bool:
        return self._finite


class CodedDenseMessage(DenseMessage):
    """A message of all entries, rounded, decoded at once."""

    def __init__(self, payload: Tensor, values: Tensor, finite: bool) -> None:
        super().__init__(payload, values)
        self._finite = finite

    def finite(self) -> bool:
        return self._finite


def sparse_nbytes(code: Codec, k: int, numel: int, dtype: torch.dtype) -> int:
    """Bytes of k of numel entries: their values, then their indices, up to a multiple of 8."""
    return code.nbytes(k, dtype) + aligned(index_codec.indices_nbytes(k, numel))


def write_sparse(code: Codec, values: Tensor, indices: Tensor | None, numel: int, payload: Tensor) -> Message:
    """The message of ``values`` (k,) at ``indices`` (k,); k = numel needs no indices.

    The message's values are read back from the payload: what the sender subtracts is, bit for bit, what receivers add.
    """
    k, dtype = values.numel(), values.dtype
    at = code.nbytes(k, dtype)
    code.write(values, payload[:at])
    size = index_codec.indices_nbytes(k, numel)
    if indices is not None and size:
        index_codec.encode(indices, numel, payload[at : at + size])
        payload[at + size :].zero_()
    return coded_message(code, payload, payload[: code.nbytes(k, dtype)], k, numel, dtype, indices)


def open_sparse(code: Codec, payload: Tensor, k: int, numel: int, dtype: torch.dtype) -> Message:
    """The message whose bytes ``payload`` holds.

    Raises:
        CommError: the bytes are not those of k indices.
    """
    indices = None
    if k != numel:
        at = code.nbytes(k, dtype)
        indices = index_codec.decode(payload[at : at + index_codec.indices_nbytes(k, numel)], k, numel)
    return coded_message(code, payload, payload[: code.nbytes(k, dtype)], k, numel, dtype, indices)


def open_sparse_rows(
    code: Codec, payloads: Sequence[Tensor], k: int, numel: int, dtype: torch.dtype
) -> Sequence[Message]:
    """As :func:`open_sparse`, for several payloads of one size, in far fewer calls if they are on the host.

    Raises:
        CommError: the bytes of some payload are not those of k indices.
    """
    if k == numel or not k or len(payloads) < 2 or not host.numpy_sees(payloads[0]):
        return [open_sparse(code, payload, k, numel, dtype) for payload in payloads]
    at = code.nbytes(k, dtype)
    rows = torch.stack(list(payloads))
    indices = index_codec.decode_rows(rows[:, at : at + index_codec.indices_nbytes(k, numel)], k, numel)
    values = code.read_rows(rows[:, :at], k, dtype)
    if isinstance(code, Exact):
        return [SparseMessage(*parts) for parts in zip(payloads, values, indices, strict=True)]
    return [
        CodedSparseMessage(payload, numbers, places, code.finite(payload[:at], k, dtype))
        for payload, numbers, places in zip(payloads, values, indices, strict=True)
    ]


def coded_message(
    code: Codec, payload: Tensor, coded: Tensor, k: int, numel: int, dtype: torch.dtype, indices: Tensor | None
) -> Message:
    """The message of the k values in the bytes ``coded`` at ``indices``, which are None if k = numel."""
    values = code.read(coded, k, dtype)
    exact = isinstance(code, Exact)
    if k == numel:
        return (
            DenseMessage(payload, values) if exact else CodedDenseMessage(payload, values, code.finite(coded, k, dtype))
        )
    assert indices is not None
    if exact:
        return SparseMessage(payload, values, indices)
    return CodedSparseMessage(payload, values, indices, code.finite(coded, k, dtype))
