"""The checkpoints of a session: when they are due, what they hold, and the way back."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Literal

import torch

from outlast.checkpoint import CheckpointConfig
from outlast.errors import NotDurable
from outlast.events import StepDone
from outlast.launch import Place
from outlast.session.agreement import StepAgreement
from outlast.session.deepspeed import TrainedEngine
from outlast.session.models import unwrapped
from outlast.session.place import RunPlace
from outlast.session.scheduled_checkpoints import ScheduledCheckpoints
from outlast.session.state import SessionState

_LOG = logging.getLogger("outlast")


class SessionCheckpoints:
    """Saves and restores a session's state. Making one is collective.

    Args:
        config: its settings.
        run: the run's directory, which holds the checkpoints unless ``config.url`` says otherwise.
        place: of this rank.
        agreement: of all ranks.
        state: what is saved.
        device: where tensors of collectives are.

    Raises:
        ConfigError, CheckpointError: see :class:`Checkpointer`; another job saves there.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        run: RunPlace,
        place: Place,
        agreement: StepAgreement,
        state: SessionState,
        device: torch.device,
    ) -> None:
        self._place = place
        self._agreement = agreement
        self._state = state
        self._scheduled = ScheduledCheckpoints(config, run.attempt, agreement.token(), place, device, run.events)
        self._checkpointer = self._scheduled.checkpointer
        try:
            for one in state.trained:
                if isinstance(one, TrainedEngine) and one.saved is not None:
                    one.saved.before_update(self._checkpointer.wait_copied)
                else:
                    self._checkpointer.watch(unwrapped(one.model), *([] if one.optimizer is None else [one.optimizer]))
        except BaseException:
            self._checkpointer.abort()
            raise

    def restore(self, which: Literal["auto"] | int) -> int:
        """Put a checkpoint back, if there is one; returns its step, or 0. Collective.

        Raises:
            CheckpointError, CommStateMismatch: see :meth:`Checkpointer.restore` and :meth:`SessionState.load`.
        """
        # Ranks that hold parts of tensors read no more than these; that takes the state as it is now.
        sharded = any(one.is_sharded for one in self._state.trained)
        restored = self._checkpointer.restore(
            which,
            any_world_size=True,
            like=self._state.collect().replicated if sharded else None,
            strict=("model",) if sharded else True,
        )
        if restored is None:
            return 0
        anew = self._state.load(restored, rank=self._place.rank, world_size=self._place.world_size)
        self._scheduled.note_restored(restored)
        for what in anew:
            _LOG.warning("step %d: %s", restored.step, what)
        return restored.step

    def save_if_due(self, step: int, *, wanted: bool) -> None:
        """Begin a save if one is due after this step, or wanted. With ``auto`` it is collective now and then."""
        if self._scheduled.due(step, wanted=wanted):
            self._save(step)

    def wait_copied(self) -> None:
        """See :meth:`Session.wait_copied`."""
        self._checkpointer.wait_copied()

    def note(self, done: StepDone) -> None:
        """Let the schedule learn from a step."""
        self._scheduled.note_step(done)

    def finish(self, step: int) -> None:
        """Make the state after ``step`` durable, and end. Collective.

        Raises:
            NotDurable: on all ranks, if the last save failed.
            SnapshotMutated: see :meth:`Checkpointer.close`.
        """
        if step > self._scheduled.stored_step and self._scheduled.due(step, wanted=True):
            self._save(step)
        failure: NotDurable | None = None
        try:
            self._checkpointer.close()
        except NotDurable as problem:
            failure = problem
        failed = self._agreement.maximum(int(failure is not None))
        if failure is not None:
            raise failure
        if failed:
            raise NotDurable("the session has ended, but its last step is not durable", "see the message of rank 0")

    def leave(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """What a ``with`` block's end does; nothing after :meth:`finish`."""
        self._checkpointer.__exit__(kind, error, tb)

    def _save(self, step: int) -> None:
        for one in self._state.trained:
            one.check_unchanged()
        now = self._state.collect()
        self._scheduled.save(step, now.replicated, now.local, now.eager)
