"""One rank's files of one save: tensors into the arena, the arena into the store."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

from outlast.checkpoint._arena import Arena, Region
from outlast.checkpoint._layout import Share
from outlast.checkpoint._records import FileEntry, crc_hex
from outlast.checkpoint._snapshot import Snapshot
from outlast.checkpoint._store import Store
from outlast.checkpoint._zarr import CRC_BYTES
from outlast.errors import CheckpointError

_LOOK_S = 0.1


class Writing:
    """Copies the parts of a share, one after the other, and has them written by a pool of threads.

    Args:
        store: where to.
        folder: of the step, relative to the store.
        share: what.
        snapshot: of the share's parts.
        arena: where copies lie until they are durable; nobody else takes from it meanwhile.
        io: threads that write.
        look: called between steps of the work; raises if the save was given up.
        give_up: called with an error that ends the save.

    Attributes:
        eager_copied: set once no eager tensor is read any more.
        copied: set once no tensor is read any more.
        copied_at: when all were copied, on the monotonic clock; None until then.
        files: what was written, or begun, relative to the step's folder.
    """

    def __init__(
        self,
        store: Store,
        folder: str,
        share: Share,
        snapshot: Snapshot,
        arena: Arena,
        io: ThreadPoolExecutor,
        look: Callable[[], None],
        give_up: Callable[[Exception], None],
    ) -> None:
        self.eager_copied = threading.Event()
        self.copied = threading.Event()
        self.copied_at: float | None = None
        self.files: set[str] = set()
        self._store = store
        self._folder = folder
        self._documents = dict(share.documents)
        # What is needed once the tensors have been let go of.
        self._parts = [(part.path, part.nbytes) for part in share.parts]
        self._eager = sum(part.eager for part in share.parts)
        self._snapshot = snapshot
        self._arena = arena
        self._io = io
        self._look = look
        self._give_up = give_up
        self._waiting: deque[Callable[[], FileEntry]] = deque()
        self._futures: list[Future[FileEntry]] = []

    def run(self, opened: Future[list[FileEntry]]) -> list[FileEntry]:
        """Copy and write everything; what was written, all of it durable, names of files apart.

        Args:
            opened: nothing is written before it has a result, which is part of this call's result.

        Raises:
            OSError, CheckpointError: a file could not be written, or memory was damaged.
            SnapshotMutated: see :class:`Snapshot`.
        """
        try:
            try:
                self._copy_all(opened)
                self.copied_at = time.monotonic()
            finally:
                self.eager_copied.set()
                self.copied.set()
            entries = list(opened.result())
            self._start_writes()
            self._futures += [self._io.submit(self._put_document, *pair) for pair in self._documents.items()]
            return entries + [future.result() for future in self._futures]
        except Exception as error:
            # The others find this at their next look. Files must not appear after the clean-up, so wait for them.
            self._give_up(error)
            wait([opened])
            wait(self._futures)
            raise

    def _copy_all(self, opened: Future[list[FileEntry]]) -> None:
        if not self._eager:
            self.eager_copied.set()
        for index, (path, nbytes) in enumerate(self._parts):
            self._look()
            region = self._room(nbytes + CRC_BYTES, opened)
            crc = self._snapshot.copy(index, region.memory)
            self._waiting.append(partial(self._put_part, path, nbytes, region, crc))
            if index + 1 == self._eager:
                self.eager_copied.set()
            if opened.done():
                opened.result()
                self._start_writes()

    def _room(self, nbytes: int, opened: Future[list[FileEntry]]) -> Region:
        while (region := self._arena.take(nbytes)) is None:
            opened.result()
            self._start_writes()
            self._arena.wait(_LOOK_S)
            self._look()
        return region

    def _start_writes(self) -> None:
        while self._waiting:
            self._futures.append(self._io.submit(self._waiting.popleft()))

    def _put_part(self, path: str, nbytes: int, region: Region, crc: int) -> FileEntry:
        try:
            self._look()
            block = region.memory.numpy().data
            checksum = f"{crc:08x}"
            found = crc_hex(block[:nbytes])
            if found != checksum:
                raise CheckpointError(
                    f"{path}: CRC32C of the copy is {found}, of the tensor {checksum}",
                    "the tensor was changed while it was copied, or this host's memory is faulty",
                )
            self.files.add(path)
            self._store.put_block(f"{self._folder}/{path}", block, nbytes + CRC_BYTES)
            return FileEntry(path, nbytes + CRC_BYTES, checksum, True)
        except Exception as error:
            self._give_up(error)
            raise
        finally:
            self._arena.give_back(region)

    def _put_document(self, path: str, data: bytes) -> FileEntry:
        self._look()
        self.files.add(path)
        self._store.put(f"{self._folder}/{path}", [data])
        return FileEntry(path, len(data), crc_hex(data), False)
