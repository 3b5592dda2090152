"""Bits and small integers packed into bytes, low bits first: numpy on the CPU, torch operations elsewhere."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outlast.comm.compressors import host

Bytes = npt.NDArray[np.uint8]


def packed_nbytes(count: int, width: int = 1) -> int:
    """Bytes of ``count`` integers of ``width`` bits."""
    return -(-count * width // 8)


def pack_bits(bits: Tensor, out: Tensor) -> None:
    """(n,) bool into (ceil(n / 8),) uint8; unused bits are 0."""
    if host.numpy_sees(bits):
        out.numpy()[:] = np.packbits(bits.numpy(), bitorder="little")
    else:
        pack_on_device(bits, 1, out)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """(count,) bool."""
    if host.numpy_sees(packed):
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=count, bitorder="little").view(np.bool_))
    return unpack_on_device(packed, 1, count).bool()


def pack_small(values: Tensor, width: int, out: Tensor) -> None:
    """(n,) uint8, each below 2^width, into (ceil(n * width / 8),) uint8; width is 1, 2, 4 or 8."""
    if width == 8:
        out.copy_(values)
    elif width == 1:
        pack_bits(values.bool(), out)
    elif host.numpy_sees(values):
        pack_array(values.numpy(), width, out.numpy())
    else:
        pack_on_device(values, width, out)


def unpack_small(packed: Tensor, width: int, count: int) -> Tensor:
    """(count,) uint8."""
    if width == 8:
        return packed[:count]
    if not host.numpy_sees(packed):
        return unpack_on_device(packed, width, count)
    return torch.from_numpy(unpack_array(packed.numpy(), width, count))


def pack_array(values: Bytes, width: int, out: Bytes) -> None:
    """As :func:`pack_small`, for arrays; higher bits of the values are dropped."""
    if width == 8:
        out[:] = values
        return
    mask = np.uint8((1 << width) - 1)
    if width == 1:
        out[:] = np.packbits(values & mask, bitorder="little")
        return
    per_byte = 8 // width
    out[:] = 0
    for place in range(per_byte):
        part = values[place::per_byte] & mask
        out[: len(part)] |= part << np.uint8(place * width)


def unpack_array(packed: Bytes, width: int, count: int) -> Bytes:
    """As :func:`unpack_small`, for arrays (…, ceil(count * width / 8)), row by row."""
    if width == 8:
        return packed[..., :count]
    if width == 1:
        return np.unpackbits(packed, axis=-1, count=count, bitorder="little")
    per_byte = 8 // width
    result = np.empty((*packed.shape[:-1], packed.shape[-1] * per_byte), np.uint8)
    mask = np.uint8((1 << width) - 1)
    for place in range(per_byte):
        result[..., place::per_byte] = (packed >> np.uint8(place * width)) & mask
    return result[..., :count]


def pack_on_device(values: Tensor, width: int, out: Tensor) -> None:
    """As :func:`pack_small`, in torch operations alone."""
    per_byte = 8 // width
    if width == 1:
        padded = torch.zeros(out.numel() * 8, dtype=torch.uint8, device=values.device)
        padded[: values.numel()] = values
        # The product of eight bytes, each 0 or 1, with this number has their bits, first one low, as its highest byte.
        out.copy_(padded.view(torch.int64).mul_(0x0102040810204080).bitwise_right_shift_(56).bitwise_and_(0xFF))
        return
    padded = torch.zeros(out.numel() * per_byte, dtype=torch.uint8, device=values.device)
    padded[: values.numel()] = values
    weights = torch.tensor([1 << (place * width) for place in range(per_byte)], dtype=torch.uint8, device=values.device)
    out.copy_((padded.view(-1, per_byte) * weights).sum(1, dtype=torch.uint8))


def unpack_on_device(packed: Tensor, width: int, count: int) -> Tensor:
    """As :func:`unpack_small`, in torch operations alone."""
    places = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) >> places) & ((1 << width) - 1)).view(-1)[:count]
