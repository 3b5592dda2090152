"""Which tensors can be stored, and as which Zarr data type.

Stock Zarr has no bfloat16 and no 8-bit floats. They are stored bit for bit as unsigned integers of the same width, with
the name of the real type in the array's attribute ``outlast_dtype``.
"""

from __future__ import annotations

import torch

from outlast.errors import CheckpointError

NATIVE: dict[torch.dtype, str] = {
    torch.bool: "bool",
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.uint16: "uint16",
    torch.int16: "int16",
    torch.uint32: "uint32",
    torch.int32: "int32",
    torch.uint64: "uint64",
    torch.int64: "int64",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.complex64: "complex64",
    torch.complex128: "complex128",
}
DISGUISED: dict[torch.dtype, str] = {
    torch.bfloat16: "uint16",
    torch.float8_e4m3fn: "uint8",
    torch.float8_e5m2: "uint8",
    torch.float8_e4m3fnuz: "uint8",
    torch.float8_e5m2fnuz: "uint8",
}
_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in (*NATIVE, *DISGUISED)}


def dtype_name(dtype: torch.dtype) -> str:
    """E.g. ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype | None:
    """The type with this name, or None if this version of outlast does not know it."""
    return _NAMES.get(name)


def check_storable(tensor: torch.Tensor, name: str) -> None:
    """Raise :class:`CheckpointError` naming the tensor unless its bytes can be stored as they are."""
    if tensor.dtype not in NATIVE and tensor.dtype not in DISGUISED:
        raise CheckpointError(
            f"the tensor {name!r} has dtype {dtype_name(tensor.dtype)}, which cannot be stored",
            f"dtypes that can be stored: {', '.join(sorted(_NAMES))}",
        )
    if tensor.layout is not torch.strided or tensor.is_meta:
        kind = "meta" if tensor.is_meta else str(tensor.layout)
        raise CheckpointError(f"the tensor {name!r} is {kind}; only dense local tensors can be stored")
