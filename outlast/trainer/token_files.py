"""Files of tokens: nanoGPT's bare uint16 or uint32, and Megatron's ``.bin`` with its ``.idx``."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from outlast.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the type, sequences, documents


def token_type(files: Sequence[Path], form: str) -> np.dtype[Any]:
    """The type of the tokens in ``files``, little-endian.

    Args:
        files: at least one; for ``megatron`` the ``.bin`` files.
        form: ``text`` (bytes), ``uint16``, ``uint32`` or ``megatron``.

    Raises:
        DataError: a file does not hold a whole number of tokens; or an index is missing, is none, or does not fit its
            ``.bin``; or files have different types.
    """
    types = {"text": np.uint8, "uint16": np.uint16, "uint32": np.uint32}
    if form in types:
        dtype: np.dtype[Any] = np.dtype(types[form]).newbyteorder("<")
        for file in files:
            if file.stat().st_size % dtype.itemsize:
                raise DataError(
                    f"{file} has {file.stat().st_size} bytes, which is no whole number of {form} tokens",
                    "set data.format to what the file holds",
                )
        return dtype
    found = {file: _megatron_type(file) for file in files}
    if len(set(found.values())) > 1:
        raise DataError(
            "tokens are of different types: " + ", ".join(f"{file}: {dtype}" for file, dtype in found.items()),
            "write all of them with the same type",
        )
    return found[files[0]]


def _megatron_type(file: Path) -> np.dtype[Any]:
    index = file.with_suffix(".idx")
    if file.suffix != ".bin":
        raise DataError(f'{file} is not a .bin, with data.format = "megatron"', "name the .bin files in data.files")
    try:
        content = index.read_bytes()
    except OSError as error:
        raise DataError(f"the index of {file} cannot be read: {error}", "it belongs beside the .bin") from error
    if len(content) < _HEADER.size or not content.startswith(_MAGIC):
        raise DataError(f"{index} is not an index of Megatron's", "write it with Megatron's preprocess_data.py")
    _, version, code, sequences, _ = _HEADER.unpack_from(content)
    if version != 1 or code not in _DTYPES:
        raise DataError(f"{index} has version {version} and type {code}; known are version 1, types {list(_DTYPES)}")
    dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
    if len(content) < _HEADER.size + 4 * sequences:
        raise DataError(f"{index} is cut off: it has {len(content)} bytes for {sequences} sequences")
    tokens = int(np.frombuffer(content, "<i4", sequences, _HEADER.size).sum(dtype=np.int64))
    if tokens * dtype.itemsize != file.stat().st_size:
        raise DataError(
            f"{index} counts {tokens} tokens of {dtype.itemsize} bytes, and {file} has {file.stat().st_size} bytes",
            "one of the two is of another data set, or cut off",
        )
    return dtype
