"""Host memory through which the state is copied on its way to storage."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from outlast.checkpoint.memory.pages import allocate
from outlast.checkpoint.memory.pinning import pin, unpin

PAGE_BYTES = 4096


@dataclass(frozen=True)
class Region:
    """A piece of the arena's memory."""

    offset: int
    nbytes: int
    """A multiple of the page size."""
    memory: torch.Tensor
    """(nbytes,) uint8; it begins at a page boundary."""


class Arena:
    """One buffer, allocated once, out of which regions are taken and given back; first fit.

    Methods may be called from several threads.

    Args:
        limit_bytes: of its memory; 0 takes what a whole save needs.
    """

    def __init__(self, limit_bytes: int = 0) -> None:
        self.limit_bytes = limit_bytes // PAGE_BYTES * PAGE_BYTES
        self._pages = torch.empty(0, dtype=torch.uint8)
        self._pinned = False
        self._free: list[tuple[int, int]] = []  # (offset, nbytes), ascending, no two of them adjacent
        self._changed = threading.Condition()

    @property
    def nbytes(self) -> int:
        """Size of its memory."""
        return self._pages.numel()

    def reserve(self, sizes: Sequence[int], *, pinned: bool) -> None:
        """Have room for regions of these sizes, all at once or, with a limit, in turn; only while none is taken.

        Args:
            sizes: of the regions that will be taken, in bytes.
            pinned: whether to page-lock the memory.
        """
        nbytes = sum(map(room, sizes))
        if self.limit_bytes:
            nbytes = max(min(nbytes, self.limit_bytes), max(map(room, sizes), default=0))
        if self._pages.numel() < nbytes:
            self.clear()  # the old one goes before the new one comes
            buffer = torch.from_numpy(allocate(nbytes + PAGE_BYTES, huge=pinned))
            start = -buffer.data_ptr() % PAGE_BYTES
            self._pages = buffer[start : start + nbytes]
        if pinned and not self._pinned:
            self._pinned = pin(self._pages)
        with self._changed:
            self._free = [(0, self._pages.numel())]

    def clear(self) -> None:
        """Give the memory back; a region that is taken stays with whoever has it, page-locked if it was."""
        if self._pinned and self._free == [(0, self._pages.numel())]:
            unpin(self._pages)
        self._pages, self._pinned, self._free = torch.empty(0, dtype=torch.uint8), False, []

    def take(self, nbytes: int) -> Region | None:
        """A region for ``nbytes``, or None while none is free."""
        taken = room(nbytes)
        with self._changed:
            for index, (offset, size) in enumerate(self._free):
                if size >= taken:
                    rest = [(offset + taken, size - taken)] if size > taken else []
                    self._free[index : index + 1] = rest
                    return Region(offset, taken, self._pages[offset : offset + taken])
        return None

    def give_back(self, region: Region) -> None:
        """Free a region, so that it may be taken again."""
        with self._changed:
            spans = sorted([*self._free, (region.offset, region.nbytes)])
            merged = [spans[0]]
            for offset, size in spans[1:]:
                last, length = merged[-1]
                if last + length == offset:
                    merged[-1] = (last, length + size)
                else:
                    merged.append((offset, size))
            self._free = merged
            self._changed.notify_all()

    def wait(self, limit_s: float) -> None:
        """Wait until a region is given back, or for ``limit_s``."""
        with self._changed:
            self._changed.wait(limit_s)


def room(nbytes: int) -> int:
    """Bytes of a region for ``nbytes``: whole pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
