"""What a restore puts in order in the storage and on the nodes, before it looks for a step and once it has one.

Nothing is changed that the next start needs: interrupted overwrites are undone first, and damaged or newer steps are
set aside only once a valid one is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from outlast.checkpoint.format.names import COMMIT, step_name
from outlast.checkpoint.restore.messages import Failure, StoredStep, all_gather_messages
from outlast.checkpoint.restore.request import RestoreContext
from outlast.checkpoint.restore.survey import Survey
from outlast.checkpoint.steps.catalog import Scan, bring_back, clear_leftover, only_readable, scan, set_aside
from outlast.checkpoint.storage.base import Store
from outlast.errors import CheckpointError

_log = logging.getLogger("outlast.checkpoint")
T = TypeVar("T")
NO_STEP = -1
"""Stands for the restored step where there is none."""
_FIX = "check the storage and its permissions"


@dataclass(frozen=True)
class Housekeeping:
    """Rank 0 changes the storage, and each node's leader its node. The methods are collective.

    Failure contract: where the storage fails rank 0, every rank raises :class:`CheckpointError`. A storage that is
    read-only is no failure: what cannot be changed stays, and the report says so.
    """

    context: RestoreContext
    survey: Survey | None
    """Of the nodes; None: there is no tier but storage."""

    def prepare(self, step: int | None) -> Scan:
        """Undo interrupted overwrites, and list the steps in storage; the list is the same on all ranks.

        Args:
            step: the one to restore; None: the newest. Where an interrupted overwrite of it cannot be undone, that is
                an error: an older step must not be taken in its place.
        """
        scanned = self._on_rank_0(lambda: self._bring_back_and_scan(step))
        own = []
        if scanned is not None:
            own = [StoredStep(step, committed=True) for step in scanned.committed]
            own += [StoredStep(step, committed=False) for step in scanned.uncommitted]
        stored = [message for _, message in all_gather_messages(self.context.agreement, StoredStep, own)]
        return Scan(
            tuple(message.step for message in stored if message.committed),
            tuple(message.step for message in stored if not message.committed),
        )

    def finish(
        self, scanned: Scan, restored: int, *, damaged: Iterable[int] = (), superseded: Iterable[int] = ()
    ) -> None:
        """Clear away what the restored step leaves behind: in storage, and newer steps on the nodes.

        Args:
            scanned: what :meth:`prepare` returned; its uncommitted steps are removed, or set aside.
            restored: the step that was loaded; ``NO_STEP`` where there is none.
            damaged: committed steps to set aside, whose faults are reported.
            superseded: committed steps to set aside because they are newer than the one that was asked for.
        """

        def clear() -> None:
            for step in damaged:
                _log.warning("%s: %s", step_name(step), self._set_aside(step))
            for step in scanned.uncommitted:
                outcome = self._unless_read_only(step, clear_leftover)
                self.context.report(step, f"the save was cut off before its commit record; {outcome}", COMMIT)
            for step in superseded:
                self.context.report(step, f"newer than the restored step {restored}; {self._set_aside(step)}")

        self._on_rank_0(clear)
        if self.survey is not None:
            self.survey.discard(newer_than=restored)

    def _bring_back_and_scan(self, step: int | None) -> Scan:
        scanned = scan(self.context.store)
        if not scanned.replaced:
            return scanned
        left_replaced = bring_back(self.context.store, scanned.replaced)
        scanned = scan(self.context.store)
        for replaced, reason in left_replaced:
            self.context.report(replaced, reason)
        for replaced, reason in left_replaced:
            if replaced == step or (step is None and replaced > max(scanned.committed, default=NO_STEP)):
                raise CheckpointError(f"{self.context.store.url}/{step_name(replaced)} exists, but {reason}", _FIX)
        return scanned

    def _set_aside(self, step: int) -> str:
        return self._unless_read_only(step, lambda store, step: f"set aside as {set_aside(store, step)}")

    def _unless_read_only(self, step: int, change: Callable[[Store, int], str]) -> str:
        """The outcome in words; a step that cannot be changed can be read all the same."""
        try:
            return change(self.context.store, step)
        except OSError as error:
            if not only_readable(error):
                raise
            return f"left in place, because the storage is read-only: {error}"

    def _on_rank_0(self, task: Callable[[], T]) -> T | None:
        """Rank 0's result, None on the other ranks; if it fails, every rank raises."""
        result, failures = None, []
        if self.context.rank == 0:
            try:
                result = task()
            except OSError as error:
                what = f"{self.context.store.url} cannot be listed or put in order: {error}"
                failures = [Failure(CheckpointError.__name__, what, _FIX)]
            except CheckpointError as error:
                failures = [Failure.of(error)]
        # No rank goes on before all are here.
        for _, failure in all_gather_messages(self.context.agreement, Failure, failures):
            raise failure.as_error()
        return result
