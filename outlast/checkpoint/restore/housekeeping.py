"""What a restore finds in the storage, and what is put in order once the run goes on from the restored step.

A restore itself changes nothing: a job that only reads must not. What it leaves to be done is a :class:`Settlement`,
which is carried out when the run takes the place for its own, with the first step or save after the restore.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from outlast.checkpoint.format.names import COMMIT, step_name
from outlast.checkpoint.restore.messages import Failure, StoredStep, all_gather_messages
from outlast.checkpoint.restore.request import RestoreContext
from outlast.checkpoint.restore.survey import Survey
from outlast.checkpoint.steps.catalog import (
    Scan,
    bring_back,
    clear_leftover,
    only_readable,
    opened_by,
    scan,
    set_aside,
)
from outlast.checkpoint.steps.overlay import overlay, scan_readable
from outlast.checkpoint.storage.base import Store
from outlast.errors import CheckpointError, PlaceInUse

_log = logging.getLogger("outlast.checkpoint")
NO_STEP = -1
"""Stands for the restored step where there is none."""
_FIX = "check the storage and its permissions"


def find_steps(context: RestoreContext) -> tuple[Scan, RestoreContext]:
    """The steps in storage, and a context that reads them; the list is the same on all ranks. Collective.

    A step whose overwrite was interrupted is read from where its older commit is kept.

    Raises:
        CheckpointError: rank 0 cannot list the storage; raised on every rank.
    """
    own: list[StoredStep] = []
    failures: list[Failure] = []
    if context.rank == 0:
        try:
            scanned = scan_readable(context.store)
            own = [StoredStep(step, committed=True, replaced=step in scanned.replaced) for step in scanned.committed]
            own += [StoredStep(step, committed=False) for step in scanned.uncommitted]
        except OSError as error:
            what = f"{context.store.url} cannot be listed: {error}"
            failures = [Failure(CheckpointError.__name__, what, _FIX)]
    for _, failure in all_gather_messages(context.agreement, Failure, failures):
        raise failure.as_error()
    stored = [message for _, message in all_gather_messages(context.agreement, StoredStep, own)]
    found = Scan(
        tuple(message.step for message in stored if message.committed),
        tuple(message.step for message in stored if not message.committed),
        tuple(message.step for message in stored if message.replaced),
    )
    return found, replace(context, store=overlay(context.store, found.replaced))


@dataclass(frozen=True)
class Settlement:
    """What is left to do when the run goes on from a restored step. Not collective."""

    context: RestoreContext
    """With the store itself."""
    survey: Survey | None
    """Of the nodes; None: there is no tier but storage."""
    found: Scan
    """The steps that the restore saw."""
    restored: int
    """The step that was loaded; ``NO_STEP`` where there is none."""
    damaged: Mapping[int, bytes] = field(default_factory=dict)
    """Commit records of committed steps to set aside, whose faults are reported; by step."""
    superseded: Mapping[int, bytes] = field(default_factory=dict)
    """Likewise of those that are newer than the one that was asked for."""

    def settle_storage(self, attempt_id: str) -> None:
        """Undo interrupted overwrites, clear away cut-off saves, and set aside what the restored step leaves behind.

        On rank 0, once this run owns the place. What cannot be changed because the storage is read-only stays, and the
        report says so.

        Args:
            attempt_id: of this run, whose own saves are nobody else's.

        Raises:
            PlaceInUse: another job has saved newer steps since the restore.
            OSError: the storage fails.
        """
        store = self.context.store
        scanned = self._bring_back_and_scan()
        newer = [step for step in scanned.committed if step > self.restored]
        strangers = [step for step in newer if step not in self.found.committed and not self._own(step, attempt_id)]
        if strangers:
            since = "found no step" if self.restored == NO_STEP else f"restored step {self.restored}"
            raise PlaceInUse(
                f"{store.url}: another job has saved {_steps(strangers)} since this one {since}",
                "restore again, or save to another place",
            )
        for step in self._unchanged(scanned, self.damaged):
            _log.warning("%s: %s", step_name(step), self._set_aside(step))
        for step in scanned.uncommitted:
            if self._own(step, attempt_id):
                continue  # it may still be running; if it has failed, it has cleaned up after itself
            outcome = self._unless_read_only(step, clear_leftover)
            if scanned.committed and step < scanned.committed[-1]:
                _log.info("%s: removing it, or an earlier save of it, was cut off; %s", step_name(step), outcome)
            else:
                _log.warning("%s: the save was cut off before its commit record; %s", step_name(step), outcome)
        for step in self._unchanged(scanned, self.superseded):
            _log.warning("%s: newer than step %d; %s", step_name(step), self.restored, self._set_aside(step))

    def _own(self, step: int, attempt_id: str) -> bool:
        opened = opened_by(self.context.store, step)
        return opened is not None and opened[0] == attempt_id

    def settle_node(self) -> None:
        """Remove newer steps from this node's memory and disk; on its leader."""
        if self.survey is not None:
            self.survey.discard(newer_than=self.restored)

    def _bring_back_and_scan(self) -> Scan:
        scanned = scan(self.context.store)
        if not scanned.replaced:
            return scanned
        for step, reason in bring_back(self.context.store, scanned.replaced):
            self.context.report(step, reason)
        return scan(self.context.store)

    def _unchanged(self, scanned: Scan, records: Mapping[int, bytes]) -> list[int]:
        """Those steps that are still what the restore saw."""
        store = self.context.store
        return [step for step, data in records.items() if step in scanned.committed and record_of(store, step) == data]

    def _set_aside(self, step: int) -> str:
        return self._unless_read_only(
            step, lambda store, step: f"kept as {set_aside(store, step)}, which is never read"
        )

    def _unless_read_only(self, step: int, change: Callable[[Store, int], str]) -> str:
        """The outcome in words; a step that cannot be changed can be read all the same."""
        try:
            return change(self.context.store, step)
        except OSError as error:
            if not only_readable(error):
                raise
            return f"left in place, because the storage is read-only: {error}"


def record_of(store: Store, step: int) -> bytes:
    """The bytes of a step's commit record, as far as they can be read: they tell whether it is still the same save."""
    try:
        return bytes(store.read(f"{step_name(step)}/{COMMIT}"))
    except OSError:
        return b""


def records_of(context: RestoreContext, steps: Iterable[int]) -> dict[int, bytes]:
    """The commit records of some steps, on rank 0."""
    return {step: record_of(context.store, step) for step in steps} if context.rank == 0 else {}


def _steps(steps: list[int]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"
