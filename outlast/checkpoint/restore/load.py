"""One candidate is loaded: every byte verified, and what any rank finds wrong known to all."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from outlast.checkpoint.format.names import STORAGE, step_name
from outlast.checkpoint.format.records import Fault
from outlast.checkpoint.restore.candidates import Candidate
from outlast.checkpoint.restore.copies import AvailableCopies
from outlast.checkpoint.restore.messages import Failure, all_gather_messages
from outlast.checkpoint.restore.read_once import SharedFiles, read_once
from outlast.checkpoint.restore.request import RestoreContext, RestoreRequest
from outlast.checkpoint.restore.survey import SaveOnNodes, Survey
from outlast.checkpoint.restore.transfer import gather_copies
from outlast.checkpoint.state.matching import Mismatch
from outlast.checkpoint.state.selection import Selection
from outlast.checkpoint.steps.commit import read_commit
from outlast.checkpoint.steps.reader import StepReader, as_error
from outlast.checkpoint.storage.base import Store
from outlast.errors import CheckpointError, CorruptCheckpoint, IncompleteCheckpoint, StateMismatch
from outlast.events import CheckpointRestored


@dataclass(frozen=True)
class Restored:
    """State read back: nested dictionaries as they were saved, tensors on the CPU, each with memory of its own.

    Restored into a running job's sharding, a DTensor has this rank's part on the CPU, whatever its mesh's device.
    """

    step: int
    replicated: dict[str, Any]
    local: dict[str, Any]
    """This rank's; empty where another world size saved the step."""
    world_size: int
    """Of the job that saved it."""
    read_local: Callable[[int], dict[str, Any]]
    """The local state of any rank that saved it, read and verified again; until the Checkpointer is closed.
    (Where the step is in memory alone and the world size is the same: of this rank.) Raises CorruptCheckpoint,
    IncompleteCheckpoint and their like if it is no longer there as it was."""
    not_taken: tuple[Mismatch, ...] = ()
    """What was not taken of the replicated state, because step and running state differ in it: in both directions,
    sorted by name; always empty unless ``strict`` allows for it."""
    as_saved: bool = True
    """Whether this is all of the step's state, with the names and types that it was saved with."""


@dataclass(frozen=True)
class Loader:
    """Loads candidates for one rank. Collective."""

    context: RestoreContext
    request: RestoreRequest
    survey: Survey | None
    """Of the nodes; None: there is no tier but storage."""

    def load(self, candidate: Candidate) -> Restored | list[Fault]:
        """The state, or what makes the candidate invalid; the same answer on all ranks.

        A file that is read straight into the running job's tensors is verified on the way, in one pass. Which copy to
        take instead is worked out only if one is damaged.

        Raises:
            StateMismatch: another world size, or other tensors; no file is at fault.
            CheckpointError: a rank cannot read the storage, or the format version is unknown; names the rank.
        """
        target = self.request.target
        if candidate.on_nodes is not None and target is not None and target.fill:
            outcome = self._attempt(candidate, verify=False)
            if isinstance(outcome, Restored):
                return outcome
        return self._attempt(candidate, verify=True)

    def _attempt(self, candidate: Candidate, *, verify: bool) -> Restored | list[Fault]:
        began = time.monotonic()
        copies, shared = self._copies(candidate, verify), self._shared(candidate)
        restored: Restored | None = None
        bytes_by_tier: Counter[str] = Counter()
        failures: list[Failure] = []
        unforeseen: Exception | None = None
        try:
            restored, bytes_by_tier = self._read(candidate, copies, shared)
        except (Fault, StateMismatch, OSError) as error:
            failures = [Failure.of(error)]
        except Exception as error:  # too little memory, or a bug: the other ranks wait for this one's answer
            unforeseen, failures = error, [Failure.of(error)]
        faults = self._faults_of_all(candidate.step, failures, unforeseen)
        if restored is None or faults:
            return faults
        if copies is not None and copies.damaged and candidate.on_nodes is not None and self.survey is not None:
            self.context.report_faults(candidate.step, copies.damage_faults())
            self.survey.quarantine(candidate.on_nodes, copies.damaged)
        self.context.on_event(
            CheckpointRestored(
                step=candidate.step,
                url=self.context.store.url,
                seconds=time.monotonic() - began,
                tiers=dict(bytes_by_tier),
            )
        )
        return restored

    def _copies(self, candidate: Candidate, verify: bool) -> AvailableCopies | None:
        """What the nodes have of a candidate; collective."""
        if candidate.on_nodes is None or self.survey is None:
            return None
        return gather_copies(self.survey, candidate.on_nodes, self.request.boxes, verify=verify)

    def _shared(self, candidate: Candidate) -> SharedFiles | None:
        """What all ranks need of a step in storage; collective."""
        if candidate.on_nodes is not None or not self.request.read_once or self.context.world_size == 1:
            return None
        return read_once(self.context, candidate.step, self.request.boxes, self.request.selection)

    def _read(
        self, candidate: Candidate, copies: AvailableCopies | None, shared: SharedFiles | None
    ) -> tuple[Restored, Counter[str]]:
        """This rank's part of the reading, and how many bytes came from which tier. Not collective.

        Raises:
            Fault: a file is missing or damaged.
            StateMismatch: another world size, or other tensors.
            OSError: the storage cannot be read.
        """
        context, step, save = self.context, candidate.step, candidate.on_nodes
        if save is not None and (fault := save.missing_fault()) is not None and not _is_in_storage(context.store, save):
            raise fault
        source = copies if copies is not None else shared
        commit = save.commit if save is not None else None
        votes = copies.votes if copies is not None else {}
        reader = StepReader(context.store, step, context.io, source, commit, votes)
        saved_by = reader.commit.world_size
        # Every rank reads the replicated state, those ranks a shard that need it (together they need all of a tensor),
        # and its owner a local state: so together the ranks verify every file.
        selection = self.request.selection
        local: dict[str, Any] = {}
        if saved_by == context.world_size:
            local, _ = reader.load_selected(context.rank, None, selection)
        elif self.request.any_world_size:
            others = range(context.rank, saved_by, context.world_size) if self.request.verify_other_ranks else ()
            for fault in reader.check(others, selection=selection):
                raise fault
        else:
            raise StateMismatch(
                f"{context.store.url}/{step_name(step)} was saved by {saved_by} ranks, "
                f"this job has {context.world_size}",
                "pass any_world_size=True; each rank's own state then comes by restored.read_local(rank), and a "
                "reducer's is redistributed by reducer.load_resharded(read, restored.world_size). Or start with the "
                "world size that saved it",
            )
        replicated, matched = reader.load_selected(None, self.request.target, selection)
        _check_parts(selection, {*replicated, *local}, context, reader)
        bytes_by_tier = Counter(source.bytes_by_tier.counts if source is not None else {})
        if reader.stored_bytes:
            bytes_by_tier[STORAGE] += reader.stored_bytes
        read_local = partial(read_local_of, reader, context.store)
        as_saved = selection.takes_all and matched.is_as_saved
        return Restored(step, replicated, local, saved_by, read_local, matched.not_taken, as_saved), bytes_by_tier

    def _faults_of_all(self, step: int, failures: list[Failure], unforeseen: Exception | None) -> list[Fault]:
        """The faults of files on any rank, one for each file; raises every other failure. Collective."""
        of_all = all_gather_messages(self.context.agreement, Failure, failures)
        if unforeseen is not None:
            raise unforeseen
        for rank, failure in of_all:
            if failure.error_type is StateMismatch:
                raise StateMismatch(failure.reason, failure.fix)
            if failure.error_type not in (CorruptCheckpoint, IncompleteCheckpoint):
                fault = failure.as_fault()
                reason = f"{fault.reason} (found by rank {rank})"
                raise as_error(Fault(fault.kind, fault.file, reason), self.context.store, step)
        by_file: dict[str, Fault] = {}
        for _, failure in of_all:
            by_file.setdefault(failure.file, failure.as_fault())
        return list(by_file.values())


def _check_parts(selection: Selection, found: Collection[str], context: RestoreContext, reader: StepReader) -> None:
    """Raise :class:`StateMismatch` if a part that was asked for is in neither state of the step."""
    missing = sorted((selection.parts or frozenset()) - set(found))
    if missing and (missing := sorted(set(missing) - set(reader.parts()))):
        raise StateMismatch(
            f"{context.store.url}/{step_name(reader.step)} has no part {', '.join(map(repr, missing))}",
            f"its parts: {', '.join(reader.parts()) or 'none'}",
        )


def _is_in_storage(store: Store, save: SaveOnNodes) -> bool:
    """Whether the storage has this very save too."""
    try:
        commit = read_commit(store, save.commit.step)
    except Fault:
        return False
    return (commit.attempt_id, commit.save_id) == save.key and commit.votes == save.commit.votes


def read_local_of(reader: StepReader, store: Store, rank: int) -> dict[str, Any]:
    """A rank's own state of a step.

    Raises:
        CheckpointError: it is damaged, or the storage cannot be read.
    """
    try:
        return reader.load(rank)
    except Fault as fault:
        raise as_error(fault, store, reader.step) from fault
    except OSError as error:
        raise CheckpointError(f"{store.url} cannot be read: {error}") from error
