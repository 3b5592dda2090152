"""Writes one rank's files of one save from host memory into the store."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, wait
from contextlib import closing

from outlast.checkpoint.format.records import CRC_BYTES, FileEntry, crc_hex
from outlast.checkpoint.save.source import Copied, Source
from outlast.checkpoint.storage.base import Store
from outlast.errors import CheckpointError


class Writer:
    """Writes what a source gives, with a pool of threads.

    Args:
        store: to write to.
        folder: of the step, relative to the store.
        documents: small files, by path relative to the folder.
        source: of the chunks.
        io: threads that write.
        check_cancelled: called before each file; raises if the save was given up.
        give_up: called with the error that ends the save, from any of the threads.
        sign: called when something was copied.

    Attributes:
        files: those that were written, or begun, relative to the step's folder.
    """

    def __init__(
        self,
        store: Store,
        folder: str,
        documents: Mapping[str, bytes],
        source: Source,
        io: Executor,
        check_cancelled: Callable[[], None],
        give_up: Callable[[Exception], None],
        sign: Callable[[], None],
    ) -> None:
        self.files: set[str] = set()
        self._store = store
        self._folder = folder
        self._documents = dict(documents)
        self._source = source
        self._io = io
        self._check_cancelled = check_cancelled
        self._give_up = give_up
        self._sign = sign
        self._waiting: deque[Copied] = deque()
        self._futures: list[Future[FileEntry]] = []

    def run(self, opened: Future[list[FileEntry]]) -> list[FileEntry]:
        """Copy and write everything.

        Args:
            opened: nothing is written before it has a result, which is part of this call's result.

        Returns:
            The files. Their bytes are durable, their directory entries are not.

        Raises:
            OSError, CheckpointError: a file could not be written, or memory was damaged.
            SnapshotMutated: see :class:`Snapshot`.
        """
        try:
            with closing(self._source.copies(self._check_cancelled)) as copies:
                for copied in copies:
                    if copied is not None:
                        self._waiting.append(copied)
                        self._sign()
                    if copied is None or opened.done():
                        opened.result()
                        self._start_writes()
            entries = list(opened.result())
            self._start_writes()
            self._futures += [self._io.submit(self._put_document, *pair) for pair in self._documents.items()]
            return entries + [future.result() for future in self._futures]
        except Exception as error:
            # The other threads check for this. No file must appear after the clean-up, so wait for them.
            self._give_up(error)
            wait([opened])
            wait(self._futures)
            raise

    def _start_writes(self) -> None:
        while self._waiting:
            self._futures.append(self._io.submit(self._put_part, self._waiting.popleft()))

    def _put_part(self, part: Copied) -> FileEntry:
        try:
            self._check_cancelled()
            block = part.memory.numpy().data
            checksum = f"{part.crc:08x}"
            computed = crc_hex(block[: part.nbytes])
            if computed != checksum:
                raise CheckpointError(
                    f"{part.path}: the copy has CRC32C {computed}, the tensor had {checksum}",
                    "the tensor was changed while it was copied, or this host's memory is faulty",
                )
            self.files.add(part.path)
            self._store.put_block(f"{self._folder}/{part.path}", block, part.nbytes + CRC_BYTES)
            return FileEntry(part.path, part.nbytes + CRC_BYTES, checksum, True)
        except Exception as error:
            self._give_up(error)
            raise
        finally:
            part.release()

    def _put_document(self, path: str, data: bytes) -> FileEntry:
        self._check_cancelled()
        self.files.add(path)
        self._store.put(f"{self._folder}/{path}", [data])
        return FileEntry(path, len(data), crc_hex(data), False)
