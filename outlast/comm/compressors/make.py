"""Compressors by name."""

from __future__ import annotations

from outlast.comm.compressors.base import Compressor
from outlast.comm.compressors.compose import Gear
from outlast.comm.compressors.dense import Dense
from outlast.comm.compressors.lowrank import LowRank
from outlast.comm.compressors.quantise import Int4, Int8, Natural, Sign
from outlast.comm.compressors.randk import RandK
from outlast.comm.compressors.topk import BlockTopK, TopK
from outlast.comm.config import COMPRESSORS
from outlast.config import nearest
from outlast.errors import UnknownCompressor


def make_compressor(
    name: str,
    *,
    density: float = 0.01,
    selection: str = "auto",
    rank: int = 4,
    values: str = "fp32",
    block: int | None = None,
) -> Compressor:
    """The compressor of one of COMPRESSORS. Each uses the settings it has and ignores the others.

    Args:
        name: which.
        density: share of entries sent: topk, block-topk, randk, and gear's outliers.
        selection: topk and gear: ``auto``, ``exact`` or ``sampled``.
        rank: lowrank and gear.
        values: topk, block-topk, randk, lowrank and gear: how the numbers sent are written, one of VALUES.
        block: block-topk: entries of a block (1 / density); int8 (256), int4 and gear (32): entries that share a unit;
            sign: entries that share a mean (all). None takes the figure in parentheses.

    Raises:
        UnknownCompressor: no such compressor; names the nearest one that exists.
        OutOfRange: a setting is out of its range.
    """
    if name == "topk":
        return TopK(density, selection=selection, values=values)
    if name == "block-topk":
        return BlockTopK(density, values=values, block=block)
    if name == "randk":
        return RandK(density, values=values)
    if name == "sign":
        return Sign(block)
    if name == "int8":
        return Int8() if block is None else Int8(block)
    if name == "int4":
        return Int4() if block is None else Int4(block)
    if name == "natural":
        return Natural()
    if name == "lowrank":
        return LowRank(rank, values=values)
    if name == "gear":
        return Gear(density, rank, values=values, block=block, selection=selection)
    if name == "dense":
        return Dense()
    raise UnknownCompressor(f"comm.compressor = {name!r}: there is no such compressor", nearest(name, COMPRESSORS))
