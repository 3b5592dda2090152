"""Codecs by name."""

from __future__ import annotations

import torch

from outlast.comm.compressors.blockwise import Blocks
from outlast.comm.compressors.codecs import Codec, Exact, Half
from outlast.comm.compressors.signs import Powers, Signs
from outlast.comm.config import VALUES
from outlast.config import nearest, require
from outlast.errors import OutOfRange

INT8_BLOCK = 256
INT4_BLOCK = 32


def codec(values: str, block: int | None = None) -> Codec:
    """The codec of one of VALUES: how the numbers of sparse and low-rank messages are written.

    ``fp32`` writes numbers as they are: float64 stays float64.

    Args:
        values: its name.
        block: entries that share a unit (int8: default 256, int4: 32) or a mean (sign: all); others have none.

    Raises:
        OutOfRange: no such codec, or a block below 1.
    """
    if block is not None:
        require(block >= 1, "block", block, "block >= 1")
    if values == "int8":
        return Blocks(8, block or INT8_BLOCK)
    if values == "int4":
        return Blocks(4, block or INT4_BLOCK)
    if values == "sign":
        return Signs(block)
    if values in ("fp16", "bf16"):
        return Half(torch.float16 if values == "fp16" else torch.bfloat16)
    if values == "natural":
        return Powers()
    if values == "fp32":
        return Exact()
    raise OutOfRange(f"values = {values!r} is not known", nearest(values, VALUES))
