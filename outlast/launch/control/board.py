"""Where a journal is kept."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Protocol

from outlast.checkpoint.storage.base import Store
from outlast.launch.control.journal import Journal
from outlast.launch.control.records import MAX_RECORD_BYTES, BadRecord, Record, decode, encode
from outlast.launch.sealed import Seal


class Board(Protocol):
    """Keeps records under consecutive numbers, each of which can be written once, and the newest sign of life.

    Methods may be called from several threads, and block for as long as the place does. All raise OSError if it cannot
    be read or written.
    """

    place: str
    """For people."""

    def append(self, number: int, data: bytes) -> None:
        """Write a record; durable on return.

        Raises:
            FileExistsError: the number is taken, by other bytes.
        """

    def read(self, number: int) -> bytes | None:
        """A record; None if there is none, or none yet, as a cache sees it."""

    def show(self, sign: bytes) -> None:
        """Write the sign of life over the one before."""

    def sign(self) -> bytes | None:
        """The newest sign, as a cache sees it; None: there is none."""


class MemoryBoard:
    """A journal in this process: it ends with it.

    Args:
        place: for people.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self._lock = threading.Lock()
        self._records: dict[int, bytes] = {}
        self._sign: bytes | None = None

    def append(self, number: int, data: bytes) -> None:
        with self._lock:
            if self._records.setdefault(number, data) != data:
                raise FileExistsError(number)

    def read(self, number: int) -> bytes | None:
        with self._lock:
            return self._records.get(number)

    def show(self, sign: bytes) -> None:
        self._sign = sign

    def sign(self) -> bytes | None:
        return self._sign


class StoreBoard:
    """A journal in a folder or an object store that all nodes reach.

    Args:
        store: whose URL all nodes reach.
        folder: of the journal, below it.
    """

    def __init__(self, store: Store, folder: str) -> None:
        self.place = f"{store.url}/{folder}"
        self._store = store
        self._folder = folder

    def append(self, number: int, data: bytes) -> None:
        self._store.create_whole(self._at(number), data)

    def read(self, number: int) -> bytes | None:
        try:
            return bytes(self._store.read(self._at(number), MAX_RECORD_BYTES))
        except FileNotFoundError:
            return None

    def show(self, sign: bytes) -> None:
        self._store.put_atomic(f"{self._folder}/sign", sign)

    def sign(self) -> bytes | None:
        with suppress(FileNotFoundError):
            return bytes(self._store.read(f"{self._folder}/sign", 4096))
        return None

    def _at(self, number: int) -> str:
        return f"{self._folder}/{number:08d}.json"


class SealedBoard:
    """Reads and writes records that carry the run's MAC.

    Args:
        board: keeps them.
        secret: of the run.
        run_id: a record of another run does not open.
    """

    def __init__(self, board: Board, secret: bytes, run_id: str) -> None:
        self.place = board.place
        self._board = board
        self._seal = Seal(secret, f"outlast control\0{run_id}")

    def append(self, number: int, record: Record) -> None:
        """Write a record; durable on return.

        Raises:
            FileExistsError: the number is taken.
            OSError: the place cannot be written.
        """
        self._board.append(number, self._seal.seal(encode(record)))

    def read_on(self, journal: Journal) -> list[tuple[int, Record]]:
        """The records that follow those that the journal has.

        Raises:
            BadRecord: one was written with another secret, or by another version.
            OSError: the place cannot be read.
        """
        found: list[tuple[int, Record]] = []
        number = journal.number
        while (data := self._board.read(number + 1)) is not None:
            number += 1
            opened = self._seal.open(data)
            if opened is None:
                raise BadRecord(
                    f"record {number} in {self.place} was not written with this run's secret, or for another run id"
                )
            found.append((number, decode(opened)))
        return found

    def show(self, sign: bytes) -> None:
        """Write the sign of life."""
        self._board.show(self._seal.seal(sign))

    def sign(self) -> bytes | None:
        """The newest sign; None if there is none that this run has written."""
        sealed = self._board.sign()
        return None if sealed is None else self._seal.open(sealed)
