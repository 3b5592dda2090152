"""The header of a safetensors file, looked at before anything is read of the tensors that it announces."""

from __future__ import annotations

import json
import os
from typing import Any

from outlast.checkpoint.convert.archive_bounds import as_size, elements
from outlast.checkpoint.convert.hugging_face import without_repeats
from outlast.checkpoint.convert.source_files import open_source
from outlast.checkpoint.format.fields import Malformed, as_list, as_mapping, as_text, member, only
from outlast.errors import CorruptCheckpoint

_LENGTH_BYTES = 8
_HEADER_BYTES = 100_000_000
"""At most, as the package has it."""
_METADATA = "__metadata__"
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Of the types whose elements have whole bytes; the package knows the others."""


def check_header(path: str) -> None:
    """Look at a file's header.

    Raises:
        CorruptCheckpoint: it is damaged, or its tensors have bytes that the file has not, or each other's; names them.
        OSError: the file cannot be opened, or is no regular file.
    """
    with open_source(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        left_bytes = size_bytes - _LENGTH_BYTES - length
        if left_bytes < 0 or length > _HEADER_BYTES:
            raise CorruptCheckpoint(
                f"{path}: its header is to have {length} bytes; the file has {size_bytes}, and a header at most "
                f"{_HEADER_BYTES}",
                "it is damaged, or not a safetensors file",
            )
        data = file.read(length)
    try:
        spans = _spans(as_mapping(json.loads(data, object_pairs_hook=without_repeats), "the header"), left_bytes)
    except RecursionError as error:
        raise CorruptCheckpoint(f"{path}: its header is nested too deeply") from error
    except ValueError as error:
        raise CorruptCheckpoint(f"{path}: its header is malformed: {error}", "copy it again") from error
    end, before = 0, ""
    for start, stop, name in sorted(spans):
        if start != end:
            what = f"overlaps {before!r:.80}, which ends" if start < end else "leaves out bytes, which begin"
            raise CorruptCheckpoint(f"{path}: the tensor {name!r:.80} at {start} {what} at {end}", "copy it again")
        end, before = stop, name
    if end != left_bytes:
        raise CorruptCheckpoint(f"{path}: its tensors have {end} bytes, the file has {left_bytes} for them")


def _spans(header: dict[str, Any], left_bytes: int) -> list[tuple[int, int, str]]:
    """Begin and end of each tensor, and its name; raises ValueError."""
    spans = []
    for name, entry in header.items():
        if name == _METADATA:
            if not all(type(text) is str for text in as_mapping(entry, _METADATA).values()):
                raise Malformed(f"{_METADATA} has what is not a text")
            continue
        where = f"the tensor {name!r:.80}"
        fields = as_mapping(entry, where)
        only(fields, "dtype", "shape", "data_offsets")
        dtype, shape = as_text(member(fields, "dtype"), f"{where}: dtype"), member(fields, "shape")
        offsets = as_list(member(fields, "data_offsets"), f"{where}: data_offsets")
        if len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
            raise Malformed(f"{where}: data_offsets are not two integers")
        start, stop = offsets
        if not 0 <= start <= stop <= left_bytes:
            raise Malformed(f"{where}: data_offsets {start} to {stop} are not within {left_bytes} bytes")
        numel = elements(as_size(shape))
        if dtype in _ITEM_BYTES and numel * _ITEM_BYTES[dtype] != stop - start:
            raise Malformed(f"{where}: {numel} elements of {dtype} do not have {stop - start} bytes")
        spans.append((start, stop, name))
    return spans
