"""The codec's passes over GPU memory, as Triton kernels: fewer passes than torch operations take, and the CPU's bits.

Callers ask :func:`handles`, and use torch operations for other tensors. Both give the same result, except where CUDA's
own operations round or order differently from the CPU's (each function says where).

========================  ============================================  =====================================
function                  in place of                                   memory it goes through, entries of 4 bytes
========================  ============================================  =====================================
:func:`select`            add, topk, compare, nonzero, index_select,    2 numel (4 numel with ``plus``), O(k)
                          subtract
:func:`largest_in_blocks` amax, compare, nonzero                        numel
:func:`add_sparse`        index_add_                                    O(k) for each message
:func:`quantise_blocks`   amax, amin, divide, multiply, round, convert  1.25 numel for 8 bits
:func:`add_blocks`        convert, multiply, add                        2.25 numel for 8 bits
:func:`absolute_sums`     abs, sum, amax, amin                          numel
:func:`pack_signs`        compare, shift, sum                           1.03 numel
:func:`add_signs`         shift, convert, multiply, add                 2.03 numel
========================  ============================================  =====================================

Indices are packed in torch operations: there are only as many as selected entries, one in a hundred of the tensor.

They are checked against the CPU codec, bit for bit, on an H100 (docs/gpu.md, which says how fast they are) and, where
there is no GPU, in Triton's interpreter (``TRITON_INTERPRET=1``, on tensors in the host's memory); and in what they
compile to for Hopper GPUs, which needs none: products and sums are not fused (``enable_fp_fusion=False``), no sum takes
small numbers for 0, and the only atomic operations add integers, whose order does not show.

Triton is imported when a kernel is first called, not before; builds of torch for CUDA bring it.
"""

from outlast.comm.kernels.blockwise import add_blocks, fits_blocks, quantise_blocks
from outlast.comm.kernels.launch import WIDEST_BLOCK, available, handles
from outlast.comm.kernels.signs import absolute_sums, add_signs, pack_signs
from outlast.comm.kernels.sparse import Selected, add_sparse, largest_in_blocks, select

__all__ = [
    "WIDEST_BLOCK",
    "Selected",
    "absolute_sums",
    "add_blocks",
    "add_signs",
    "add_sparse",
    "available",
    "fits_blocks",
    "handles",
    "largest_in_blocks",
    "pack_signs",
    "quantise_blocks",
    "select",
]
