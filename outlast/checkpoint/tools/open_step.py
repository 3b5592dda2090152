"""A committed step, opened for the tools: no process group, public errors, one rank's state at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

from outlast.checkpoint.format.names import COMMIT, parse_step, step_name
from outlast.checkpoint.format.records import Fault
from outlast.checkpoint.format.zarr import ArrayInfo
from outlast.checkpoint.state.selection import EVERYTHING, Selection
from outlast.checkpoint.steps.catalog import scan
from outlast.checkpoint.steps.reader import StepReader, as_error
from outlast.checkpoint.storage.base import Store
from outlast.checkpoint.storage.io_threads import IoThreads
from outlast.checkpoint.storage.open import open_store
from outlast.errors import CheckpointError, CheckpointNotFound

THREADS = 4
"""How many threads read and verify."""


class OpenedStep:
    """A committed step to read. A context manager, which ends its threads.

    Args:
        url: of the checkpoints.
        step: its number; None takes the newest committed one.
        option: by which a command line takes the step's number, for messages.

    Raises:
        CheckpointNotFound: the step does not exist.
        CorruptCheckpoint, IncompleteCheckpoint, UnknownFormatVersion: its commit record or a vote; names the file.
        CheckpointError: the storage cannot be read.
    """

    def __init__(self, url: str | os.PathLike[str], step: int | None, option: str = "--step") -> None:
        self._url = url
        with ExitStack() as stack:
            io = stack.enter_context(IoThreads(THREADS))
            with storage(url) as self._store:
                self.step = choose(self._store, step, option)
                with self._faults():
                    self._reader = StepReader(self._store, self.step, io)
            self._open = stack.pop_all()
        self.commit = self._reader.commit
        self.world_size = self.commit.world_size
        self.url = f"{self._store.url}/{step_name(self.step)}"

    def load(self, rank: int | None, selection: Selection = EVERYTHING) -> dict[str, Any]:
        """The local state of a rank, or (None) the replicated state; every byte is verified, tensors are on the CPU.

        Objects of classes that this program has not imported are stand-ins (``format.classes.Unloaded``).

        Args:
            rank: whose.
            selection: what is taken of it.

        Raises:
            CorruptCheckpoint, IncompleteCheckpoint: names the file.
            StateMismatch: see :meth:`StepReader.load_selected`.
            CheckpointError: the storage cannot be read.
        """
        with storage(self._url), self._faults():
            return self._reader.load_selected(rank, None, selection, stand_ins=True)[0]

    def parts(self) -> list[str]:
        """The top-level keys of its states."""
        return self._reader.parts()

    def describe(self, rank: int | None) -> tuple[dict[str, ArrayInfo], dict[str, dict[str, Any]]]:
        """As :meth:`StepReader.describe`; raises as :meth:`load` does."""
        with storage(self._url), self._faults():
            return self._reader.describe(rank)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._open.close()

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except Fault as fault:
            raise as_error(fault, self._store, self.step) from fault


def choose(store: Store, step: int | None, option: str = "--step") -> int:
    """The step, if it exists (None: the newest committed one).

    Raises:
        CheckpointNotFound: it does not exist; names the committed steps, or the folder that was meant.
    """
    scanned = scan(store)
    if step is None and scanned.committed:
        return scanned.committed[-1]
    if step is not None and step in (*scanned.committed, *scanned.uncommitted):
        return step
    committed = ", ".join(map(str, scanned.committed))
    raise CheckpointNotFound(
        f"no checkpoint{'' if step is None else f' of step {step}'} at {store.url}",
        f"committed steps: {committed}" if committed else where_steps_are(store, option),
    )


def where_steps_are(store: Store, option: str = "") -> str:
    """What to give instead of a URL without committed steps: of the folder of a step, the one above and its number.

    Args:
        store: at that URL.
        option: by which the command takes the number; empty: it takes none.
    """
    above, _, last = store.url.rstrip("/").rpartition("/")
    step = parse_step(last)
    names = store.names("")
    if step is not None and COMMIT in names:
        return f"this is step {step} itself: give {above}" + (f" {option} {step}" if option else "")
    if "checkpoints" in names:
        return f"this looks like a run's directory: give {store.url}/checkpoints"
    return f"no folder step_*/ there has a {COMMIT}; give the folder that contains the step_* folders"


@contextmanager
def storage(url: str | os.PathLike[str]) -> Iterator[Store]:
    """The store at a URL; an OSError within becomes a :class:`CheckpointError`."""
    store = open_store(url)
    try:
        yield store
    except OSError as error:
        raise CheckpointError(f"{store.url} cannot be read: {error}") from error
