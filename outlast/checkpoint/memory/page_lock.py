"""Shared memory that a GPU copies into at the speed of its link: page-locked where it is."""

from __future__ import annotations

import logging
import mmap

import torch

_log = logging.getLogger("outlast.checkpoint")


class SharedMapping(mmap.mmap):
    """A shared mapping that lets go of its page lock before it is unmapped."""

    _locked_at: int | None = None

    def page_lock(self, address: int) -> None:
        """Page-lock the whole mapping, so that copies from a GPU need no bounce buffer and do not block their caller.

        Where the driver refuses, copies still work, through a bounce buffer at a fraction of the speed; that is logged.

        Args:
            address: of the mapping's first byte.
        """
        status = int(torch.cuda.cudart().cudaHostRegister(address, len(self), 0))  # type: ignore[no-untyped-call]
        if status:
            _log.warning(
                "%d bytes of shared memory cannot be page-locked (CUDA error %d): copies from the GPU will be slow",
                len(self),
                status,
            )
            return
        self._locked_at = address

    def __del__(self) -> None:
        # Not by a finalizer: mmap unmaps before those are called.
        if self._locked_at is not None:
            torch.cuda.cudart().cudaHostUnregister(self._locked_at)  # type: ignore[no-untyped-call]
