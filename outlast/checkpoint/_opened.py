"""A committed step opened for the tools: no process group, public errors, one rank's state at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from outlast.checkpoint._inspect import _choose, _storage
from outlast.checkpoint._names import step_name
from outlast.checkpoint._reading import StepReader, as_error
from outlast.checkpoint._records import Fault

_THREADS = 4


class OpenedStep:
    """A committed step to read; for a ``with``, which ends its threads.

    Args:
        url: where checkpoints lie.
        step: which; None takes the newest committed one.

    Raises:
        CheckpointNotFound: no such step.
        CorruptCheckpoint, IncompleteCheckpoint, UnknownFormatVersion: its commit record or a vote; names the file.
        CheckpointError: the place cannot be read.
    """

    def __init__(self, url: str | os.PathLike[str], step: int | None) -> None:
        self._url = url
        self._io = ThreadPoolExecutor(_THREADS)
        try:
            with _storage(url) as store:
                self._store = store
                self.step = _choose(store, step)
                with self._faults():
                    self._reader = StepReader(store, self.step, self._io)
        except BaseException:
            self._io.shutdown()
            raise
        self.world_size = self._reader.commit.world_size
        self.url = f"{store.url}/{step_name(self.step)}"

    def load(self, rank: int | None) -> dict[str, Any]:
        """The local state of a rank, or (None) the replicated state; every byte is verified, tensors are on the CPU.

        Raises:
            CorruptCheckpoint, IncompleteCheckpoint: names the file.
            CheckpointError: the place cannot be read.
        """
        with _storage(self._url), self._faults():
            return self._reader.load(rank)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._io.shutdown()

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except Fault as fault:
            raise as_error(fault, self._store, self.step) from fault
