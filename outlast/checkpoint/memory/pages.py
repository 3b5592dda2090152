"""Host memory that is fast to touch for the first time.

Faulting in each 4 KiB page on its first touch costs more than the copy into it (measured on a virtual machine: 0.66 s
for 384 MB, against 0.12 s once touched), and threads that do so wait for one another. One call that fills all page
tables avoids most of that. (There, pages of 2 MiB were slower than small ones while the page cache was full.)
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np
import numpy.typing as npt

Buffer = npt.NDArray[np.uint8]

CACHED_BYTES = 1 << 20
"""Bytes to read at a time if they are read again at once: they are still in the processor's own cache then."""


_LEAST_BYTES = 1 << 20
_POPULATE_WRITE = 23
"""``MADV_POPULATE_WRITE`` of Linux 5.14, which Python 3.11 does not name."""


def allocate(nbytes: int, *, huge: bool = False) -> npt.NDArray[np.uint8]:
    """New memory that is about to be filled: (nbytes,) uint8, its content undefined. It is freed with its last view.

    Args:
        nbytes: how much.
        huge: in pages of 2 MiB where the system has them; they are quicker to page-lock.
    """
    if nbytes < _LEAST_BYTES:
        return np.empty(nbytes, np.uint8)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge:
        with suppress(OSError):  # a kernel without
            memory.madvise(mmap.MADV_HUGEPAGE)
    map_all(memory)
    return np.frombuffer(memory, np.uint8)


def map_all(memory: mmap.mmap) -> None:
    """Fill the page tables of a mapping before it is written."""
    try:
        memory.madvise(_POPULATE_WRITE)
    except OSError:
        return  # an older kernel: the pages are touched one by one
