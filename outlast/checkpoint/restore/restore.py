"""Restoring: all ranks agree on the newest step of which every file is what was written."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np

from outlast import errors
from outlast.checkpoint.format.names import COMMIT, STORAGE, step_name
from outlast.checkpoint.format.records import Fault, FileEntry, Vote
from outlast.checkpoint.memory.pages import Buffer
from outlast.checkpoint.peers.collectives import Agreement
from outlast.checkpoint.restore.copies import AvailableCopies, BytesByTier, SurveyedSave, bad_faults, missing_fault
from outlast.checkpoint.restore.read_once import Shared, read_once
from outlast.checkpoint.restore.survey import Survey
from outlast.checkpoint.state.target import RestoreTarget
from outlast.checkpoint.steps.catalog import Scan, bring_back, clear_leftover, only_readable, scan, set_aside
from outlast.checkpoint.steps.commit import read_commit
from outlast.checkpoint.steps.reader import StepReader, as_error
from outlast.checkpoint.storage.base import Store
from outlast.errors import (
    CheckpointError,
    CheckpointNotFound,
    CorruptCheckpoint,
    IncompleteCheckpoint,
    StateMismatch,
)
from outlast.events import CheckpointRejected, CheckpointRestored, Event

_log = logging.getLogger("outlast.checkpoint")
_NONE = -1


@dataclass(frozen=True)
class Restored:
    """State read back; nested dictionaries as they were saved, tensors on the CPU, each with memory of its own.

    Restored into a running job's sharding, a DTensor has this rank's part on the CPU, whatever its mesh's device.
    """

    step: int
    replicated: dict[str, Any]
    local: dict[str, Any]
    """This rank's; empty where another number of ranks saved it."""
    world_size: int
    """How many ranks saved it."""
    read_local: Callable[[int], dict[str, Any]]
    """The local state of any of the ranks that saved it, read and verified anew; until the Checkpointer is closed.
    (Of a step that lies in memory alone, and was saved by as many ranks as there are now: of this rank.) Raises
    CorruptCheckpoint, IncompleteCheckpoint and their like if it is not there any more as it was."""


@dataclass(frozen=True)
class _Candidate:
    step: int
    save: SurveyedSave | None
    """None: it lies in storage."""


@dataclass(frozen=True)
class _CopySource:
    """Memory first, then what another rank has read."""

    gathered: AvailableCopies | None
    shared: Shared | None
    taken: BytesByTier

    def __call__(self, entry: FileEntry) -> Buffer | None:
        found = self.gathered(entry) if self.gathered is not None else None
        return found if found is not None else self._read_by_another(entry)

    def fill(self, entry: FileEntry, out: Buffer) -> bool:
        if self.gathered is not None and self.gathered.fill(entry, out):
            return True
        found = self._read_by_another(entry)
        if found is not None:
            np.copyto(out, found[: len(out)])
        return found is not None

    def _read_by_another(self, entry: FileEntry) -> Buffer | None:
        self.taken.add(STORAGE, entry.size_bytes)
        return self.shared(entry) if self.shared is not None else None


@dataclass(frozen=True)
class Restoring:
    """One rank's part of a restore. The methods are collective over the agreement's group."""

    store: Store
    rank: int
    world_size: int
    agreement: Agreement
    on_event: Callable[[Event], None]
    io: ThreadPoolExecutor
    any_world_size: bool = False
    wanted: RestoreTarget | None = None
    """What the running job needs of which tensors; None: all of all."""
    read_once: bool = False
    """Whether what all ranks need of storage is read by one and sent to the others."""
    survey: Survey | None = None
    """Of host memory; None: there is no such tier."""

    def newest(self) -> Restored | None:
        """The newest valid step; damaged ones are set aside. None if there is not a single one."""
        found = self._scan()
        rejected: list[tuple[int, list[Fault]]] = []
        for candidate in self._newest_first(found):
            result = self._try(candidate)
            if isinstance(result, Restored):
                self._set_aside([step for step, _ in rejected])
                self._clear(found)
                self._forget(result.step)
                return result
            if candidate.save is None:
                rejected.append((candidate.step, result))
            self._report_faults(candidate.step, result)
        if rejected:
            # Nothing is set aside here: the next start must find the same and stop as well, not begin from nothing.
            lines = [f"step {step}: {fault}" for step, faults in rejected for fault in faults]
            raise CorruptCheckpoint(
                f"{self.store.url}: there are checkpoints, but none is valid:\n  " + "\n  ".join(lines),
                "nothing was changed; repair one, or move them away to start anew",
            )
        # What memory has and nobody can use is no reason to stop: lost memory cannot be repaired.
        self._clear(found)
        self._forget(_NONE)
        return None

    def exactly(self, step: int) -> Restored:
        """One step. Newer ones are set aside: they are of a future that this run no longer has."""
        found = self._scan(step)
        for save in self._memory_saves():
            if save.commit.step == step:
                result = self._try(_Candidate(step, save))
                if isinstance(result, Restored):
                    self._clear(found, newer_than=step)
                    self._forget(step)
                    return result
                self._report_faults(step, result)
        have = self.agreement.broadcast_int(2 if step in found.committed else 1 if step in found.uncommitted else 0)
        if have == 0:
            raise self._not_found(step)
        if have == 1:
            fault = Fault(IncompleteCheckpoint, COMMIT, "missing: the checkpoint was never completed")
            raise as_error(fault, self.store, step)
        result = self._try(_Candidate(step, None))
        if not isinstance(result, Restored):
            raise as_error(result[0], self.store, step)
        self._clear(found, newer_than=step)
        self._forget(step)
        return result

    def _try(self, candidate: _Candidate) -> Restored | list[Fault]:
        """Load and verify; what any rank found wrong, every rank is told.

        What is read to where it belongs is verified on the way, in one pass. Which copy else to take is only then found
        out if one is damaged.
        """
        if candidate.save is not None and self.wanted is not None and self.wanted.fill:
            result = self._try_once(candidate, verify=False)
            if isinstance(result, Restored):
                return result
        return self._try_once(candidate, verify=True)

    def _try_once(self, candidate: _Candidate, verify: bool) -> Restored | list[Fault]:
        began = time.monotonic()
        problem, result, step = "", None, candidate.step
        taken = BytesByTier()
        gathered, votes = self._gather(candidate, taken, verify)
        shared = self._share(candidate)
        try:
            result = self._load(candidate, gathered, votes, shared, taken)
        except Fault as fault:
            problem = _pack(fault.kind, fault.file, fault.reason)
        except StateMismatch as error:
            problem = _pack(StateMismatch, error.fix, error.what)
        except OSError as error:
            problem = _pack(CheckpointError, "", f"{type(error).__name__}: {error}")
        texts = self.agreement.all_gather_text(problem)
        found = [(rank, _unpack(text)) for rank, text in enumerate(texts) if text]
        faults = list({other.file: other for _, other in reversed(found)}.values())[::-1]
        if result is not None and not faults:
            if gathered is not None and candidate.save is not None and self.survey is not None:
                self._report_faults(step, bad_faults(gathered))
                self.survey.quarantine(candidate.save, gathered)
            seconds = time.monotonic() - began
            tiers = dict(taken.counts)
            self.on_event(CheckpointRestored(step=step, url=self.store.url, seconds=seconds, tiers=tiers))
            return result
        for rank, other in found:
            if other.kind is StateMismatch:
                raise StateMismatch(other.reason, other.file)  # no file is at fault; there is what to do
            if other.kind not in (CorruptCheckpoint, IncompleteCheckpoint):
                note = f"{other.reason} (found by rank {rank})"
                raise as_error(Fault(other.kind, other.file, note), self.store, step)
        return faults

    def _gather(
        self, candidate: _Candidate, taken: BytesByTier, verify: bool
    ) -> tuple[AvailableCopies | None, dict[int, Vote]]:
        """What memory has of a candidate; collective."""
        save = candidate.save
        if save is None or self.survey is None:
            return None, {}
        votes = self.survey.votes(save)
        same_ranks = save.commit.world_size == self.world_size
        return self.survey.gather(save, votes, same_ranks, self.wanted, taken, verify=verify), votes

    def _share(self, candidate: _Candidate) -> Shared | None:
        """What all ranks need of a step in storage, read once; collective."""
        if candidate.save is not None or not self.read_once or self.world_size == 1:
            return None
        parts = self.wanted.boxes if self.wanted is not None else {}

        def read() -> tuple[StepReader, list[FileEntry]]:
            reader = StepReader(self.store, candidate.step, self.io)
            return reader, [entry for entry in reader.files_of(None) if entry.path.rpartition("/")[0] not in parts]

        return read_once(read, self.rank, self.world_size, self.agreement)

    def _load(
        self,
        candidate: _Candidate,
        gathered: AvailableCopies | None,
        votes: dict[int, Vote],
        shared: Shared | None,
        taken: BytesByTier,
    ) -> Restored:
        step, save = candidate.step, candidate.save
        commit = None
        if save is not None:
            commit = save.commit
            if save.missing and not self._in_store(save):
                raise missing_fault(save)

        reader = StepReader(self.store, step, self.io, _CopySource(gathered, shared, taken), commit, votes)
        saved_by = reader.commit.world_size
        # Replicated state by every rank, shards by those that need them (together the ranks need all of a tensor), and
        # local state by its owner: together the ranks verify every file.
        local: dict[str, Any] = {}
        if saved_by == self.world_size:
            local = reader.load(self.rank)
        elif self.any_world_size:
            for old in range(self.rank, saved_by, self.world_size):
                for fault in reader.verify(reader.files_of(old)):
                    raise fault
        else:
            raise StateMismatch(
                f"{self.store.url}/{step_name(step)} was saved by {saved_by} ranks, this job has {self.world_size}",
                "start with the number of ranks that saved it",
            )

        def read_local(rank: int) -> dict[str, Any]:
            try:
                return reader.load(rank)
            except Fault as fault:
                raise as_error(fault, self.store, step) from fault
            except OSError as error:
                raise CheckpointError(f"{self.store.url} cannot be read: {error}") from error

        return Restored(step, reader.load(None, self.wanted), local, saved_by, read_local)

    def _in_store(self, save: SurveyedSave) -> bool:
        """Whether storage has this very save too."""
        try:
            commit = read_commit(self.store, save.commit.step)
        except Fault:
            return False
        return (commit.attempt_id, commit.save_id) == save.key and commit.votes == save.commit.votes

    def _memory_saves(self) -> list[SurveyedSave]:
        return self.survey.saves() if self.survey is not None else []

    def _forget(self, step: int) -> None:
        """Memory of steps newer than the one gone back to is of a future that this run no longer has."""
        if self.survey is not None:
            self.survey.discard(step)

    def _scan(self, wanted: int | None = None) -> Scan:
        """What is there, as rank 0 sees it (empty on the others), for restoring one step, or (None) the newest."""
        found, problem = Scan((), ()), ""
        if self.rank == 0:
            try:
                left_alone = bring_back(self.store)
                found = scan(self.store)
                for step, reason in left_alone:
                    if step == wanted or (wanted is None and step > max(found.committed, default=_NONE)):
                        problem = f"{self.store.url}/{step_name(step)} is there to restore, but {reason}"
                    self._report(step, reason, "")
            except OSError as error:
                problem = f"{self.store.url} cannot be listed, or not be put in order: {error}"
        self._raise_if(problem)
        return found

    def _newest_first(self, found: Scan) -> Iterator[_Candidate]:
        """Saves in memory, which all ranks know, and committed steps in storage, as rank 0 knows them, on all ranks."""
        saves = self._memory_saves()
        stored = iter((*reversed(found.committed), _NONE) if self.rank == 0 else repeat(_NONE))
        step = self.agreement.broadcast_int(next(stored))
        while saves or step != _NONE:
            if saves and saves[0].commit.step >= step:
                yield _Candidate(saves[0].commit.step, saves[0])
                del saves[0]
            else:
                yield _Candidate(step, None)
                step = self.agreement.broadcast_int(next(stored))

    def _report_faults(self, step: int, faults: list[Fault]) -> None:
        if self.rank == 0:
            for fault in faults:
                self._report(step, f"{fault.kind.__name__}: {fault.reason}", fault.file)

    def _set_aside(self, steps: list[int]) -> None:
        problem = ""
        if self.rank == 0:
            try:
                for step in steps:
                    _log.warning("%s: %s", step_name(step), self._set_aside_or_leave(step))
            except OSError as error:
                problem = f"damaged checkpoints at {self.store.url} cannot be set aside: {error}"
        self._raise_if(problem)

    def _clear(self, found: Scan, newer_than: int | None = None) -> None:
        """Clear away saves that were cut off, and steps that are newer than the one gone back to."""
        problem = ""
        if self.rank == 0:
            try:
                for step in found.uncommitted:
                    done = self._or_leave(step, clear_leftover)
                    self._report(step, f"the save was cut off, there is no commit record; {done}", COMMIT)
                for step in found.committed:
                    if newer_than is not None and step > newer_than:
                        done = self._set_aside_or_leave(step)
                        self._report(step, f"newer than step {newer_than}, which was asked for; {done}", "")
            except OSError as error:
                problem = f"{self.store.url} cannot be cleared of what earlier saves left: {error}"
        self._raise_if(problem)

    def _set_aside_or_leave(self, step: int) -> str:
        return self._or_leave(step, lambda store, step: f"set aside as {set_aside(store, step)}")

    def _or_leave(self, step: int, change: Callable[[Store, int], str]) -> str:
        """What was done, in words; what can only be read stays, which is no reason not to read it."""
        try:
            return change(self.store, step)
        except OSError as error:
            if not only_readable(error):
                raise
            return f"it stays, since the place can only be read: {error}"

    def _report(self, step: int, reason: str, file: str) -> None:
        _log.warning("%s/%s: %s", step_name(step), file, reason)
        self.on_event(CheckpointRejected(step=step, reason=reason, file=file))

    def _not_found(self, step: int) -> CheckpointNotFound:
        problem = ""
        if self.rank == 0:
            try:
                committed = scan(self.store).committed
                problem = "there are steps " + ", ".join(map(str, committed)) if committed else "there is no checkpoint"
            except OSError as error:
                problem = f"it cannot be listed any more: {error}"
        hint = self.agreement.all_gather_text(problem)[0]
        return CheckpointNotFound(f"no checkpoint of step {step} at {self.store.url}", hint)

    def _raise_if(self, problem: str) -> None:
        """Raise on all ranks if there is one on any; without one, no rank goes on before all are here."""
        for text in self.agreement.all_gather_text(problem):
            if text:
                raise CheckpointError(text, "see to the storage's state and permissions")


def _pack(kind: type[CheckpointError], file: str, reason: str) -> str:
    return json.dumps([kind.__name__, file, reason])


def _unpack(text: str) -> Fault:
    kind, file, reason = json.loads(text)
    return Fault(getattr(errors, kind), file, reason)
