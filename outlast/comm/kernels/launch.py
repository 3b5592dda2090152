"""Where kernels run, and whether they can."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from outlast.errors import CommError, MissingDependency

MOST = 2**31 - 2**22
"""Most entries of a tensor: positions are 32-bit integers, and the last program goes up to 2^21 beyond the end."""
WIDEST_BLOCK = 8192
"""Most entries of a block that one program takes at once."""
ROUNDED = {"enable_fp_fusion": False}
"""Launch options of kernels that multiply and add: each of the two operations rounds, as on the CPU."""
ASSERTING = {**ROUNDED, "sanitize_overflow": False}
"""Launch options of such kernels that also assert: without the integer checks that come with assertions."""


@cache
def available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def handles(x: Tensor) -> bool:
    """Whether the kernels take ``x``: on a CUDA device, contiguous, float32, of at most 2^31 - 2^22 entries, and
    Triton is installed. Other tensors go through torch operations."""
    return x.is_cuda and available() and _takes(x)


def device_code() -> Any:
    """The module of kernels.

    Raises:
        MissingDependency: Triton is not installed.
    """
    if not available():
        raise MissingDependency(
            "the GPU kernels of the codec need triton, which is not installed",
            "install the triton release that your build of torch names, or ask kernels.handles(x) first",
        )
    return import_module("outlast.comm.kernels.device")


def checked(name: str, *tensors: Tensor) -> None:
    """Check that each tensor is contiguous float32 of at most MOST entries.

    Raises:
        CommError: one is not.
    """
    for x in tensors:
        if not _takes(x):
            raise CommError(
                f"kernels.{name}: {x.numel()} entries of {x.dtype}, {'' if x.is_contiguous() else 'not '}contiguous",
                f"pass contiguous float32 of at most {MOST} entries; use torch operations for other tensors",
            )


def on(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which kernels run on x's device, on its current stream."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def ceil_div(count: int, part: int) -> int:
    return -(-count // part)


def power_of_two(count: int) -> int:
    """The smallest power of two of at least ``count``."""
    return 1 << max(count - 1, 0).bit_length()


def _takes(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_contiguous() and x.numel() <= MOST
