"""A run's checkpoints by schedule: which steps are saved, to which tiers, and whether the newest step is in storage."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from outlast.checkpoint import CheckpointConfig, Checkpointer, Restored
from outlast.diagnostics import Recorder
from outlast.events import Event, EventLog, StepDone
from outlast.launch import Place
from outlast.launch.attempt import Attempt
from outlast.session.checkpoint_schedule import CheckpointSchedule
from outlast.session.failure_history import FailureHistory, read_failure_history


class ScheduledCheckpoints:
    """A :class:`Checkpointer` on a run's directory, and when it saves. Making one is collective.

    Args:
        config: its settings.
        attempt: this start of the run, whose directory holds the checkpoints unless ``config.url`` says otherwise.
        attempt_id: random text, equal on all ranks of this attempt and never used before.
        place: of this rank.
        device: where tensors of collectives are.
        events: takes what the checkpointer and the schedule tell.
        recorder: see :class:`CheckpointSchedule`.

    Raises:
        ConfigError, CheckpointError: see :class:`Checkpointer`; another job saves there.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        attempt: Attempt,
        attempt_id: str,
        place: Place,
        device: torch.device,
        events: EventLog,
        recorder: Recorder | None = None,
    ) -> None:
        auto = config.every_steps == "auto" and place.rank == 0
        history = read_failure_history(attempt) if auto else FailureHistory()
        self._schedule = CheckpointSchedule(config, place, device, history, recorder, events)
        self._memory_every_steps = config.memory_every_steps
        self._durable = True
        self.stored_step = 0
        """The newest step that is in storage or on its way there."""

        def emit(event: Event) -> None:
            events.write(event)
            self._schedule.on_event(event)

        self.checkpointer = Checkpointer(
            config.url if config.url is not None else str(attempt.run / "checkpoints"),
            config,
            rank=place.rank,
            world_size=place.world_size,
            attempt_id=attempt_id,
            on_event=emit,
        )
        """Saves and restores."""
        try:
            self.checkpointer.claim()
        except BaseException:
            self.checkpointer.abort()
            raise

    def due(self, step: int, *, wanted: bool) -> bool:
        """Whether to :meth:`save` after ``step``, to any tier. With ``every_steps = "auto"`` collective now and then.

        Args:
            step: that was just done.
            wanted: whether it is saved to storage in any case; the same on all ranks.
        """
        self._durable = wanted or self._schedule.due(step, saving=self.checkpointer.running)
        memory = self._memory_every_steps
        return self._durable or (memory > 0 and step % memory == 0)

    def save(self, step: int, replicated: Mapping[str, Any], local: Mapping[str, Any], eager: Collection[str]) -> None:
        """Begin to save what :meth:`due` said; see :meth:`Checkpointer.save`."""
        if self._durable:
            self.stored_step = step
        self.checkpointer.save(step, replicated=replicated, local=local, eager=eager, durable=self._durable)

    def note_restored(self, restored: Restored) -> None:
        """The run goes on from there."""
        if not self._memory_every_steps:  # otherwise it may be in memory alone
            self.stored_step = restored.step

    def note_step(self, done: StepDone) -> None:
        """Let the schedule learn from a step."""
        self._schedule.on_step(done, saving=self.checkpointer.running)
