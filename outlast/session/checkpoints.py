"""The checkpoints of a session: what they hold, and the way back."""

from __future__ import annotations

import logging
from typing import Literal

from outlast.checkpoint import CheckpointConfig
from outlast.session.place import RunPlace
from outlast.session.scheduled_checkpoints import ScheduledCheckpoints
from outlast.session.trainable import Trainable

_LOG = logging.getLogger("outlast")


class SessionCheckpoints(ScheduledCheckpoints):
    """Saves and restores what a session trains. Making one is collective.

    Args:
        config: its settings.
        run: the run's directory, which holds the checkpoints unless ``config.url`` says otherwise.
        state: what is saved.

    Raises:
        ConfigError, CheckpointError: see :class:`Checkpointer`; another job saves there.
    """

    def __init__(self, config: CheckpointConfig, run: RunPlace, state: Trainable) -> None:
        self._state = state
        self._place = run.place
        super().__init__(
            config,
            run.attempt,
            run.place,
            run.agreement,
            device=state.device,
            events=run.events,
            recorder=run.recorder,
        )
        try:
            state.attach(self.checkpointer)
        except BaseException:
            self.checkpointer.abort()
            raise

    def restore(self, which: Literal["auto"] | int) -> int:
        """Put a checkpoint back, if there is one; returns its step, or 0. Collective.

        Raises:
            CheckpointError, CommStateMismatch: see :meth:`Checkpointer.restore` and :meth:`Trainable.load`.
        """
        restored = self.read(which, self._state.like())
        if restored is None:
            return 0
        anew = self._state.load(restored, rank=self._place.rank, world_size=self._place.world_size)
        for what in anew:
            _LOG.warning("step %d: %s", restored.step, what)
        return restored.step

    def finish(self, step: int, what: str) -> None:
        """Make the state after ``step`` durable, and end. Collective.

        Args:
            step: the last one that is done.
            what: has ended, for messages.

        Raises:
            NotDurable: on all ranks, if the last save failed.
            SnapshotMutated: see :meth:`Checkpointer.close`.
        """
        self.save_last(step, self._state.collect)
        self.close()
        self.check_durable(what)
