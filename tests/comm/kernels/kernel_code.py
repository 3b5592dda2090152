"""What the GPU kernels compile to, which needs no GPU. Run by test_kernels.py, in a process of its own."""

from __future__ import annotations

import re
from typing import Any

import pytest
from triton import compile as compiled
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from outlast.comm.kernels import device
from outlast.comm.kernels.launch import ASSERTING, ROUNDED
from outlast.comm.kernels.sparse import _DIGITS

HOPPER = GPUTarget("cuda", 90, 32)
NUMBERS, INTEGERS, PLACES = "*fp32", "*i32", "*i64"
HISTOGRAM = {"values": NUMBERS, "state": INTEGERS, "bins": INTEGERS, "numel": "i32", "pieces": "i32"}
KEEP = {
    **dict.fromkeys(("values", "kept", "x"), NUMBERS),
    **dict.fromkeys(("places", "state", "before"), INTEGERS),
    **dict.fromkeys(("blocks", "numel"), "i32"),
    "indices": PLACES,
}
ONCE = {"mul.f32", "mul.rn.f32", "add.f32", "add.rn.f32", "sub.f32", "sub.rn.f32"}
"""Instructions that round, as the CPU does, and take small numbers for what they are."""
QUANTISE = {
    "x": NUMBERS, "units": "*i16", "packed": "*u8", "maxima": NUMBERS, "numel": "i32", "block": "i32"
}  # fmt: skip


def assembled(kernel: Any, signature: dict[str, str], constants: dict[str, Any], **options: Any) -> Any:
    """Assembly ``ptx`` and machine code ``sass``. An integer argument that is 1 is a constant to Triton."""
    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature={name: types[name] for name in kernel.arg_names}, constexprs=constants)
    code = compiled(source, target=HOPPER, options={"num_warps": 8, **options})
    assert code.asm["cubin"]
    return code.asm


def ptx(kernel: Any, signature: dict[str, str], constants: dict[str, Any], **options: Any) -> str:
    return str(assembled(kernel, signature, constants, **options)["ptx"])


def floats(code: str) -> set[str]:
    """The instructions on 32-bit floats."""
    return set(re.findall(r"\b((?:fma|mul|add|sub|div|rcp|atom|red)\b[\w.]*\.f32)\b", code))


def machine(code: Any) -> set[str]:
    """The instructions on 32-bit floats that multiply and add, in machine code: the assembler may fuse them too."""
    return set(re.findall(r"\b(FFMA|FMUL|FADD)\b", code["sass"]))


def test_selection() -> None:
    """Atomic operations add integers alone, and the one sum of floats rounds once and keeps small numbers."""
    counting = {"x": NUMBERS, "plus": "*bf16", "threshold": INTEGERS, "counts": INTEGERS, "numel": "i32"}
    assert floats(ptx(device.add_and_count, counting, {"ADD": True, "BLOCK": 4096})) <= ONCE
    sampling = {"x": NUMBERS, "plus": NUMBERS, "out": INTEGERS, "stride": "i32", "count": "i32"}
    ptx(device.sample, sampling, {"ADD": True, "BLOCK": 1024})
    ptx(device.sample, sampling, {"ADD": True, "BLOCK": 1024, "stride": 1})
    chosen = {"x": NUMBERS, "threshold": INTEGERS, "starts": INTEGERS, "places": INTEGERS, "values": NUMBERS}
    ptx(device.candidates, {**chosen, "numel": "i32"}, {"BLOCK": 4096})
    shift, width = _DIGITS[0]
    code = ptx(device.histogram, HISTOGRAM, {"SHIFT": shift, "WIDTH": width, "BLOCK": 4096})
    assert "atom" in code
    assert not floats(code)
    descending = {"bins": INTEGERS, "state": INTEGERS, "k": "i32"}
    ptx(device.descend, descending, {"FIRST": True, "SHIFT": shift, "WIDTH": width})
    ptx(device.descend, descending, {"FIRST": True, "SHIFT": shift, "WIDTH": width, "k": 1})
    counting = {"values": NUMBERS, "state": INTEGERS, "counts": INTEGERS, "blocks": "i32", "numel": "i32"}
    ptx(device.count_kept, counting, {"BLOCK": 4096})
    # NaN less NaN is not 0, so the difference of a value from itself has to be taken.
    assert floats(ptx(device.keep, KEEP, {"MAPPED": True, "TAKE": True, "BLOCK": 4096})) & {"sub.f32", "sub.rn.f32"}
    blocks = {"x": NUMBERS, "places": PLACES, "numel": "i32", "block": "i32"}
    ptx(device.largest_in_blocks, blocks, {"ROWS": 32, "WIDE": 128})


def test_a_product_and_a_sum_each_round_and_an_index_is_checked() -> None:
    sparse = {"out": NUMBERS, "indices": PLACES, "values": NUMBERS, "scale": "fp32", "count": "i32", "numel": "i32"}
    code = assembled(device.add_sparse, sparse, {"BLOCK": 1024}, debug=True, **ASSERTING)
    assert floats(code["ptx"]) <= ONCE
    assert "__assertfail" in code["ptx"]
    assert machine(code) == {"FMUL", "FADD"}
    fused = assembled(device.add_sparse, sparse, {"BLOCK": 1024}, debug=True, enable_fp_fusion=True)
    assert "FFMA" in machine(fused)


@pytest.mark.parametrize(("bits", "block"), [(8, 256), (4, 32)])
def test_blocks_round_at_each_step_and_divide_exactly(bits: int, block: int) -> None:
    constants = {"LEVELS": 2 ** (bits - 1) - 1, "BITS": bits, "ROWS": 4096 // block, "WIDE": block}
    code = ptx(device.quantise_blocks, QUANTISE, constants, **ROUNDED)
    assert floats(code) <= ONCE | {"div.rn.f32", "div.rn.ftz.f32", "rcp.rn.f32", "rcp.rn.ftz.f32"}
    assert code.lower().count("0f4b400000") + code.lower().count("0fcb400000") >= 2  # 1.5 * 2^23 comes and goes
    adding = {"units": "*i16", "packed": "*u8", "out": NUMBERS, "scale": "fp32"}
    adding |= dict.fromkeys(("numel", "block", "whole"), "i32")
    code = assembled(device.add_blocks, adding, {"BITS": bits, "BLOCK": 4096}, **ROUNDED)
    assert floats(code["ptx"]) <= ONCE
    assert "FFMA" not in machine(code)
    ptx(device.add_blocks, adding, {"BITS": bits, "BLOCK": 4096, "block": 1, "whole": 1}, **ROUNDED)


def test_signs() -> None:
    summing = {"x": NUMBERS, "sums": NUMBERS, "largest": INTEGERS, "numel": "i32"}
    assert floats(ptx(device.absolute_sums, summing, {"BLOCK": 8192})) <= ONCE
    ptx(device.pack_signs, {"x": NUMBERS, "packed": "*u8", "numel": "i32"}, {"BLOCK": 8192})
    adding = {"packed": "*u8", "mean": NUMBERS, "out": NUMBERS, "scale": "fp32", "numel": "i32"}
    code = assembled(device.add_signs, adding, {"BLOCK": 8192}, **ROUNDED)
    assert floats(str(code["ptx"])) <= ONCE
    assert "FFMA" not in machine(code)
