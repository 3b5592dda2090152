"""Ascending indices as bytes: the size is a function of how many there are, k, and of how many there could be, numel.

The smallest of three forms is taken; for k = numel there are no bytes at all:

``int32``
    4 bytes each.
``bitmap``
    One bit for each of numel entries.
``delta``
    Elias-Fano (Elias, J. ACM 21(2), 1974; Fano, 1971): the l low bits of each index as they are, and the rest,
    ascending, in unary: for each value of ``index >> l`` in turn, a 1 for each index that has it, then a 0. That is
    k * l bits, and a bitmap of k + ((numel - 1) >> l) bits: at most two bits per index more than the best possible
    code takes on average. The low bits are stored in planes of 16, 8, 4, 2 and 1 bits, so that packing is a few
    operations on whole arrays.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outlast.comm.buffers import scratch
from outlast.comm.compressors import host
from outlast.comm.compressors.bits import (
    Bytes,
    pack_array,
    pack_bits,
    pack_small,
    packed_nbytes,
    unpack_array,
    unpack_bits,
    unpack_small,
)
from outlast.errors import CommError

_PLANES = (16, 8, 4, 2, 1)
_MAX_LOW = 30
_HOST = torch.device("cpu")


class Form(NamedTuple):
    """How indices are encoded.

    Attributes:
        kind: ``all``, ``int32``, ``bitmap`` or ``delta``.
        nbytes: size.
        low: l, the low bits of each index in the delta form.
    """

    kind: str
    nbytes: int
    low: int = 0


@lru_cache(maxsize=4096)
def form_of(k: int, numel: int) -> Form:
    """The smallest form of k out of numel indices."""
    if k == numel or k == 0:
        return Form("all", 0)
    forms = [Form("bitmap", packed_nbytes(numel))]
    if numel <= 2**31:
        forms.insert(0, Form("int32", 4 * k))
    for low in range(min(_MAX_LOW, (numel - 1).bit_length()) + 1):
        planes = sum(packed_nbytes(k, width) for width in _PLANES if low & width)
        forms.append(Form("delta", planes + packed_nbytes(_unary_bits(k, numel, low)), low))
    return min(forms, key=lambda form: form.nbytes)


def indices_nbytes(k: int, numel: int) -> int:
    """Bytes of k ascending indices out of numel."""
    return form_of(k, numel).nbytes


def encode(indices: Tensor, numel: int, out: Tensor, form: Form | None = None) -> None:
    """Write indices.

    Args:
        indices: (k,) int64, ascending, no index twice, below numel.
        numel: how many entries there are.
        out: (indices_nbytes(k, numel),) uint8 on the same device; it may start at any even address.
        form: None takes the smallest.
    """
    k = indices.numel()
    form = form or form_of(k, numel)
    if form.kind == "delta" and host.numpy_sees(indices):
        _encode_arrays(indices.numpy(), numel, out.numpy(), form.low)
    elif form.kind == "int32":
        out.copy_(indices.to(torch.int32).view(torch.uint8))
    elif form.kind == "bitmap":
        pack_bits(_mark(indices, numel), out)
    elif form.kind == "delta":
        narrow = indices.to(torch.int32) if numel <= 2**31 else indices
        at = 0
        shift = 0
        for width in _PLANES:
            if not form.low & width:
                continue
            plane = narrow >> shift if shift else narrow
            size = packed_nbytes(k, width)
            if width == 16:
                out[at : at + size].copy_(plane.to(torch.int16).view(torch.uint8))
            else:
                # uint8 keeps the low eight bits; a narrower plane takes its own bits of them.
                small = plane.to(torch.uint8)
                pack_small(small if width == 8 else small & ((1 << width) - 1), width, out[at : at + size])
            at += size
            shift += width
        places = indices >> form.low
        places += _counting(k, indices.device)
        pack_bits(_mark(places, _unary_bits(k, numel, form.low)), out[at:])


def decode(payload: Tensor, k: int, numel: int, form: Form | None = None) -> Tensor:
    """(k,) int64: the indices that :func:`encode` wrote.

    Raises:
        CommError: the bytes are not those of k indices.
    """
    form = form or form_of(k, numel)
    device = payload.device
    if form.kind == "all":
        return torch.arange(k, device=device)
    if form.kind == "int32":
        return payload.clone().view(torch.int32).to(torch.int64)
    if form.kind == "bitmap":
        return _marked(payload, numel, k)
    if host.numpy_sees(payload):
        return torch.from_numpy(_decode_arrays(payload.numpy()[None], k, numel, form.low)[0])
    sizes = [(width, packed_nbytes(k, width)) for width in _PLANES if form.low & width]
    planes = sum(size for _, size in sizes)
    indices = _marked(payload[planes:], _unary_bits(k, numel, form.low), k)
    indices -= _counting(k, device)
    if not form.low:
        return indices
    low: Tensor | None = None
    at = shift = 0
    for width, size in sizes:
        part = payload[at : at + size]
        if width == 16:
            # int32, not int64: half the memory traffic.
            plane = part.clone().view(torch.int16).to(torch.int32) & 0xFFFF
        else:
            plane = unpack_small(part, width, k).to(torch.int32)
        low = plane if low is None else low.add_(plane.bitwise_left_shift_(shift))
        at += size
        shift += width
    assert low is not None
    indices <<= form.low
    indices += low
    return indices


def _encode_arrays(indices: npt.NDArray[np.int64], numel: int, out: Bytes, low: int) -> None:
    """The delta form, as in :func:`encode`, in fewer and shorter calls."""
    k = len(indices)
    rest = indices.astype(np.int32) if numel <= 2**31 else indices.copy()
    at = 0
    for width in _PLANES:
        if low & width:
            size = packed_nbytes(k, width)
            if width == 16:
                out[at : at + size] = rest.astype(np.uint16).view(np.uint8)
            else:
                pack_array(rest.astype(np.uint8), width, out[at : at + size])
            rest >>= width
            at += size
    places = np.add(rest, _counting(k, _HOST).numpy(), dtype=np.int64)
    marks = scratch("marks", _unary_bits(k, numel, low), torch.bool, _HOST).numpy()
    marks[:] = False
    marks[places] = True
    out[at:] = np.packbits(marks, bitorder="little")


def decode_rows(payloads: Tensor, k: int, numel: int) -> Tensor:
    """As :func:`decode`, for several at once: with many short ones the number of calls dominates.

    Args:
        payloads: (n, indices_nbytes(k, numel)) uint8 on the host; rows need not be adjacent.
        k: how many indices each row has.
        numel: see :func:`encode`.

    Returns:
        (n, k) int64.

    Raises:
        CommError: some row's bytes are not those of k indices.
    """
    form = form_of(k, numel)
    if form.kind == "delta":
        return torch.from_numpy(_decode_arrays(payloads.numpy(), k, numel, form.low))
    return torch.stack([decode(row, k, numel, form) for row in payloads])


def _decode_arrays(payloads: Bytes, k: int, numel: int, low: int) -> npt.NDArray[np.int64]:
    """The delta form, as in :func:`decode`, of each row of (n, nbytes): (n, k)."""
    n = len(payloads)
    planes = sum(packed_nbytes(k, width) for width in _PLANES if low & width)
    count = _unary_bits(k, numel, low)
    bits = np.unpackbits(payloads[:, planes:], axis=1, count=count, bitorder="little").view(np.bool_)
    places = np.flatnonzero(bits)
    starts = np.arange(0, n * count, count)
    # They ascend, so a row has its k marks if the first and the last of them are its own.
    if len(places) != n * k or (places[::k] < starts).any() or (places[k - 1 :: k] >= starts + count).any():
        marks = np.count_nonzero(bits, axis=1)
        raise _damaged(int(marks[marks != k][0]), k)
    indices = places.reshape(n, k)
    indices -= starts[:, None]
    indices -= _counting(k, _HOST).numpy()
    if not low:
        return indices
    total: npt.NDArray[np.int32] | None = None
    at = shift = 0
    for width in _PLANES:
        if low & width:
            part = payloads[:, at : at + packed_nbytes(k, width)]
            plane = (part.copy().view(np.uint16) if width == 16 else unpack_array(part, width, k)).astype(np.int32)
            plane <<= shift
            total = plane if total is None else np.bitwise_or(total, plane, out=total)
            at += part.shape[1]
            shift += width
    assert total is not None
    indices <<= low
    indices += total
    return indices


def _damaged(marked: int, k: int) -> CommError:
    return CommError(f"a payload marks {marked} indices, expected {k}: it was damaged on the way")


def _unary_bits(k: int, numel: int, low: int) -> int:
    return k + ((numel - 1) >> low)


def _counting(k: int, device: torch.device) -> Tensor:
    """0 .. k - 1, kept from call to call."""
    counts = _counts.get(device)
    if counts is None or counts.numel() < k:
        counts = _counts[device] = torch.arange(k, device=device)
    return counts[:k]


_counts: dict[torch.device, Tensor] = {}


def _mark(places: Tensor, count: int) -> Tensor:
    """(count,) bool, true at ``places``."""
    bits = scratch("marks", count, torch.bool, places.device)
    if host.numpy_sees(places):
        view = bits.numpy()
        view[:] = False
        view[places.numpy()] = True
        return bits
    return bits.zero_().index_fill_(0, places, True)


def _marked(packed: Tensor, count: int, k: int) -> Tensor:
    """(k,) int64: the positions of the 1s among ``count`` bits."""
    bits = unpack_bits(packed, count)
    places = torch.from_numpy(np.flatnonzero(bits.numpy())) if host.numpy_sees(bits) else bits.nonzero().view(-1)
    if places.numel() != k:
        raise _damaged(places.numel(), k)
    return places
