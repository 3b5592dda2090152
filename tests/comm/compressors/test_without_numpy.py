"""Tensors that numpy cannot see go through torch operations alone: the same bytes, and the same numbers out of them."""

from __future__ import annotations

import pytest
import torch

from outlast.comm.compressors import (
    COMPRESSORS,
    BlockTopK,
    Compressor,
    Gear,
    Int4,
    LowRank,
    RandK,
    Sign,
    TopK,
    host,
    make_compressor,
)
from outlast.comm.testing import inputs

SHAPES = ((24, 40), (7, 11, 13), (1,), (3, 100_001))


@pytest.mark.parametrize(
    "compressor",
    [
        *(make_compressor(name, density=0.03) for name in COMPRESSORS),
        *(TopK(0.05, values=values) for values in ("fp16", "int8", "int4", "natural", "sign")),
        TopK(0.4),
        BlockTopK(0.05, block=64),
        RandK(0.1, values="int4"),
        Int4(7),
        Sign(31),
        LowRank(2, values="int8"),
        Gear(0.02, 2),
    ],
    ids=lambda c: c.name,
)
def test_the_same_bytes_with_and_without(compressor: Compressor, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in SHAPES:
        for kind, x in inputs(shape, torch.float32):
            if len(shape) == 2 and shape[1] > 1000 and kind not in ("normal", "sparse"):
                continue
            with_numpy = compressor.compress(x).payload
            out = torch.ones(shape)
            compressor.add_to(out, with_numpy, 0.3)
            with monkeypatch.context() as context:
                context.setattr(host, "numpy_sees", lambda x: False)
                without = compressor.compress(x).payload
                other = torch.ones(shape)
                compressor.add_to(other, with_numpy, 0.3)
            assert torch.equal(with_numpy, without), (kind, shape)
            assert torch.equal(out, other), (kind, shape)
