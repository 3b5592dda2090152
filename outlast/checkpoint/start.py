"""How a run takes its place: it owns it, knows what it goes on from, and has put it in order, before it saves there.

Opening a place and restoring from it change nothing. The run *goes on* with its first save, or, after a restore, with
the first :meth:`Checkpointer.wait_copied`, which comes before the first update.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from outlast.checkpoint.format.names import step_name
from outlast.checkpoint.ownership.lease import Lease
from outlast.checkpoint.peers.collectives import Agreement
from outlast.checkpoint.restore.housekeeping import Settlement
from outlast.checkpoint.restore.load import Restored
from outlast.checkpoint.restore.messages import Failure, all_gather_messages
from outlast.checkpoint.restore.request import RestoreContext, agree_on_request
from outlast.checkpoint.restore.restore import restore
from outlast.checkpoint.restore.survey import Survey
from outlast.checkpoint.save.request import SaveContext
from outlast.checkpoint.shortage import as_os_error
from outlast.checkpoint.state.selection import Selection
from outlast.checkpoint.steps.catalog import move_all_aside, scan
from outlast.checkpoint.storage.base import Store
from outlast.checkpoint.tiers.manager import Tiers
from outlast.errors import CheckpointError, PlaceInUse

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_log = logging.getLogger("outlast.checkpoint")


class Start:
    """One rank's part in it. Methods are for the training thread; none is collective but :meth:`claim`.

    Args:
        context: who saves.
        tiers: None: there is no tier but storage.
    """

    def __init__(self, context: SaveContext, tiers: Tiers | None) -> None:
        self._context = context
        self._tiers = tiers
        self._prepared = False
        self._settlement: Settlement | None = None
        self._decided = False
        """Whether it is decided from what this run goes on."""
        self._done = False
        self._tried = False
        """Whether the storage failed when the first update came."""

    @property
    def lease(self) -> Lease:
        """On the place; rank 0 takes it."""
        return self._context.lease

    def restored(self, settlement: Settlement) -> None:
        """The run goes on from what a restore has found, if it goes on."""
        self._settlement = settlement
        self._decided, self._done, self._tried = True, False, False

    def before_update(self) -> None:
        """Go on, if the run has restored: its state is about to change. If storage fails, the next save tries again.

        Raises:
            PlaceInUse, CheckpointError: as :meth:`go_on`.
        """
        self.lease.raise_if_lost()
        if self._done or not self._decided or self._tried:
            return
        error = self.before_save()
        if error is not None:
            self._tried = True
            _log.warning("%s cannot be taken or put in order yet: %s", self._context.store.url, error)

    def before_save(self) -> OSError | None:
        """Go on; what the storage fails with makes this save fail, and the next one tries again.

        Raises:
            PlaceInUse, CheckpointError: as :meth:`go_on`.
        """
        try:
            self.go_on()
        except Exception as error:
            failure = as_os_error(error)
            if failure is None:
                raise
            return failure
        return None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Meanwhile, a save does not mean that the run goes on: it only copies again what was restored."""
        done, self._done = self._done, True
        try:
            yield
        finally:
            self._done = done

    def go_on(self) -> None:
        """Own the place and put it in order; does something once, and again after each restore.

        Raises:
            PlaceInUse: another job saves there; or the run begins anew, and there are steps of an earlier one.
            CheckpointError: the place cannot be written to.
            OSError: the storage fails meanwhile; it may be tried again.
        """
        self.lease.raise_if_lost()
        if self._done:
            return
        self._take()
        if self._settlement is not None:
            if self._context.rank == 0:
                self._settlement.settle_storage(self._context.attempt_id)
            self._settlement.settle_node()
        elif not self._decided:
            self._begin_anew()
        self._settlement = None
        self._decided = self._done = True

    def claim(self, agreement: Agreement) -> None:
        """Own the place from now on; what fails on one rank is raised on all. Collective.

        Raises:
            PlaceInUse, CheckpointError: as :meth:`go_on`.
        """
        failures = []
        try:
            self._take()
        except (CheckpointError, OSError) as error:
            failures = [Failure.of(error)]
        for _, failure in all_gather_messages(agreement, Failure, failures):
            raise failure.as_error()

    def try_claim(self, agreement: Agreement) -> bool:
        """As :meth:`claim`; False, with a line in the log, if the place cannot be had. Collective."""
        try:
            self.claim(agreement)
        except CheckpointError as error:
            _log.warning("%s", error.what)
            return False
        return True

    def _take(self) -> None:
        if not self._prepared:
            with _cannot_write(self._context.store):
                self._context.store.prepare()
        self._prepared = True
        if self._context.rank == 0:
            self.lease.take()
        elif self._tiers is not None and self._tiers.is_node_leader:
            # What is removed from this node must not be that of a job that rank 0 is refused for.
            self.lease.wait_taken(self._context.config.commit_timeout_s)

    def _begin_anew(self) -> None:
        """This run restored nothing: see to what is there of earlier ones."""
        context, tiers = self._context, self._tiers
        old_steps = context.config.old_steps
        if old_steps == "keep":
            return
        in_memory = tiers.steps_of_earlier_attempts() if tiers is not None and tiers.is_node_leader else []
        stored: list[int] = []
        if context.rank == 0:
            scanned = scan(context.store)
            stored = sorted({*scanned.committed, *scanned.replaced})
            if stored and old_steps == "set_aside":
                folder = move_all_aside(context.store)
                _log.warning("%s: this run begins anew; %s moved to %s", context.store.url, _steps(stored), folder)
        if old_steps == "refuse" and (stored or in_memory):
            where = context.store.url if stored else "this node's memory or disk"
            raise PlaceInUse(
                f"{context.store.url}: this run begins anew, but {where} has {_steps(stored or in_memory)} of an "
                "earlier one, from which the next restart would go on",
                'go on from them with restore("auto"); or save to another place; or set '
                'checkpoint.old_steps = "set_aside" to move them out of the way',
            )
        if tiers is not None:
            if in_memory:
                _log.warning("this run begins anew: %s in this node's memory removed", _steps(in_memory))
            tiers.start_anew()


class Reading:
    """One restore of one rank. Methods are collective over the group.

    Args:
        context: of the rank that reads.
        tiers: None: there is no tier but storage.
        group: see :class:`Checkpointer`.
    """

    def __init__(self, context: SaveContext, tiers: Tiers | None, group: ProcessGroup | None) -> None:
        self.agreement = Agreement(group, context.rank, context.world_size)
        self._context = context
        self._tiers = tiers
        self._group = group
        self._survey: Survey | None = None

    def restore(
        self,
        start: Start,
        which: Literal["auto"] | int,
        like: Mapping[str, Any] | None,
        into: Mapping[str, Any] | None,
        select: Callable[[], Selection],
        *,
        any_world_size: bool,
    ) -> Restored | None:
        """See :meth:`Checkpointer.restore`; ``start`` learns from what the run goes on."""
        saver, tiers = self._context, self._tiers
        context = RestoreContext(saver.store, saver.rank, saver.world_size, self.agreement, saver.on_event, saver.io)
        request = agree_on_request(like, into, self._group, context, any_world_size=any_world_size, select=select)
        if tiers is not None:
            nodes = tiers.meeting.nodes
            self._survey = Survey(tiers.folder, tiers.disk_folder, nodes, saver.rank, self.agreement, saver.io)
        restored, settlement = restore(which, context, request, self._survey)
        start.restored(settlement)
        return restored

    def lacks_copies(self, restored: Restored) -> bool:
        """Whether fewer nodes have the step in memory than should."""
        if self._survey is None or self._tiers is None:
            return False
        whole = restored.as_saved and restored.world_size == self._context.world_size
        return whole and self._survey.lacks_copies(restored.step, self._tiers.copies_in_memory)


def check_place(store: Store) -> None:
    """Raise :class:`CheckpointError` if a place does not exist and cannot be made; changes nothing."""
    with _cannot_write(store):
        store.check()


@contextmanager
def _cannot_write(store: Store) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"checkpoints cannot be written to {store.url}: {error}",
            "choose another place with checkpoint.url, or fix its permissions",
        ) from error


def _steps(steps: list[int]) -> str:
    if len(steps) == 1:
        return step_name(steps[0])
    return f"{len(steps)} steps ({step_name(steps[0])} to {step_name(steps[-1])})"
