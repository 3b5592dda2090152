"""Where the bytes of a save come from: tensors, copied one after the other, or a copy that is in memory already."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from outlast.checkpoint.format.records import CRC_BYTES
from outlast.checkpoint.memory.arena import Region
from outlast.checkpoint.save.plan import RankPlan
from outlast.checkpoint.save.snapshot import Snapshot

_LOOK_S = 0.1
_CHECKSUMS = 4
"""Threads that checksum what comes from a device: one does some 10 GB/s, and copies arrive several times as fast."""


@dataclass(frozen=True)
class Copied:
    """One part, in host memory."""

    path: str
    """Relative to the step."""
    nbytes: int
    """Of its payload; its CRC32C comes after that."""
    memory: torch.Tensor
    """(whole pages,) uint8, beginning at a page."""
    crc: int
    """Of the payload, as its source was."""
    release: Callable[[], None]
    """To be called once the memory is no longer read."""


class Room(Protocol):
    """Memory to copy to; see :class:`~outlast.checkpoint.memory.arena.Arena`."""

    def take(self, nbytes: int) -> Region | None:
        """A region for ``nbytes``, or None while there is none."""

    def give_back(self, region: Region) -> None:
        """The region may be taken again."""

    def wait(self, limit_s: float) -> None:
        """Wait until a region is given back, or for ``limit_s``."""


class Source(Protocol):
    """Parts, in the order in which they get ready."""

    eager_copied: threading.Event
    """Set once no eager tensor is read any more."""
    copied: threading.Event
    """Set once no tensor is read any more."""
    copied_at: float | None
    """When all were copied, on the monotonic clock; None until then."""

    def copies(self, check_cancelled: Callable[[], None]) -> Generator[Copied | None]:
        """The parts; None: there is no room for the next one until some are released.

        Args:
            check_cancelled: called between parts; raises if the save was given up.
        """


class TensorSource:
    """Copies the parts of a share through an arena.

    From a device, parts are begun as far ahead as there is room, and checksummed by threads, so that the device's
    copies wait for no checksum.

    Args:
        share: what.
        snapshot: of the share's parts.
        arena: or another place to copy to; nobody else takes from it meanwhile.
        prepare: called first, in the thread that copies: what makes the place ready.
        verify: compare each copy with its source while it is in the processor's cache; without it, whoever reads the
            copy next does so.
    """

    def __init__(
        self,
        share: RankPlan,
        snapshot: Snapshot,
        arena: Room,
        *,
        prepare: Callable[[], object] = lambda: None,
        verify: bool = False,
    ) -> None:
        self.eager_copied = threading.Event()
        self.copied = threading.Event()
        self.copied_at: float | None = None
        # What is needed once the tensors have been let go of.
        self._parts = [(part.path, part.nbytes) for part in share.parts]
        self._snapshot = snapshot
        self._arena = arena
        self._prepare = prepare
        self._verify = verify

    def copies(self, check_cancelled: Callable[[], None]) -> Generator[Copied | None]:
        """See :class:`Source`.

        Raises:
            SnapshotMutated: see :class:`Snapshot`.
        """
        pool = watcher = None
        try:
            snapshot, order = self._snapshot, self._snapshot.order
            if not snapshot.urgent:
                self.eager_copied.set()
            self._prepare()
            begun: deque[tuple[int, Region, Future[int] | None]] = deque()
            begin_next, all_read = 0, None
            if snapshot.runs_ahead:
                pool = ThreadPoolExecutor(_CHECKSUMS, thread_name_prefix="outlast-checksum")
                watcher = ThreadPoolExecutor(1, thread_name_prefix="outlast-copied")
            for taken in range(1, len(order) + 1):
                check_cancelled()
                while begin_next < len(order) and (snapshot.runs_ahead or not begun):
                    index = order[begin_next]
                    region = self._arena.take(self._parts[index][1] + CRC_BYTES)
                    if region is not None:
                        snapshot.start(index, region.memory)
                        take = partial(snapshot.copy, index, region.memory, verify=self._verify)
                        begun.append((index, region, None if pool is None else pool.submit(take)))
                        begin_next += 1
                        if begin_next == len(order) and watcher is not None:
                            all_read = watcher.submit(self._wait_read)
                    elif begun:
                        break
                    else:
                        yield None
                        self._arena.wait(_LOOK_S)
                        check_cancelled()
                index, region, checksum = begun.popleft()
                if checksum is None:
                    crc = snapshot.copy(index, region.memory, verify=self._verify)
                else:
                    crc = checksum.result()
                if taken == snapshot.urgent:
                    self.eager_copied.set()
                if taken == len(order):
                    if all_read is not None:
                        all_read.result()
                    self._set_copied()
                path, nbytes = self._parts[index]
                yield Copied(path, nbytes, region.memory, crc, partial(self._arena.give_back, region))
        finally:
            for each in (pool, watcher):
                if each is not None:
                    each.shutdown(cancel_futures=True)
            self.eager_copied.set()
            self.copied.set()

    def _wait_read(self) -> None:
        if self._snapshot.wait_read():
            self._set_copied()

    def _set_copied(self) -> None:
        if self.copied_at is None:
            self.copied_at = time.monotonic()
        self.copied.set()


class HeldSource:
    """Parts that were copied before, and stay where they are."""

    def __init__(self, parts: Sequence[Copied]) -> None:
        self.eager_copied = threading.Event()
        self.copied = threading.Event()
        self.copied_at: float | None = None
        self.eager_copied.set()
        self.copied.set()
        self._parts = parts

    def copies(self, check_cancelled: Callable[[], None]) -> Generator[Copied | None]:
        """See :class:`Source`."""
        for part in self._parts:
            check_cancelled()
            yield part
