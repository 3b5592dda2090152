"""A run's checkpoints by schedule: which steps are saved, to which tiers, and whether the last one is in storage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from outlast.checkpoint import CheckpointConfig, Checkpointer, Restored
from outlast.diagnostics import Recorder
from outlast.errors import NotDurable
from outlast.events import Event, EventLog, StepDone
from outlast.launch import Place
from outlast.launch.attempt import Attempt
from outlast.session.agreement import StepAgreement
from outlast.session.checkpoint_schedule import CheckpointSchedule
from outlast.session.failure_history import FailureHistory, read_failure_history


@dataclass(frozen=True, slots=True)
class Collected:
    """The state of one rank, as :meth:`Checkpointer.save` takes it. The tensors are the live ones, not copies."""

    replicated: dict[str, Any]
    """What is equal on all ranks."""
    local: dict[str, Any]
    """What is this rank's own."""
    eager: frozenset[str]
    """Top-level keys whose tensors the next step may change before the update; they are copied at once."""


Collect = Callable[[int], Collected]
"""The state after a step."""


class ScheduledCheckpoints:
    """A :class:`Checkpointer` on a run's directory, and when it saves. Making one is collective.

    Args:
        config: its settings.
        attempt: this start of the run, whose directory holds the checkpoints unless ``config.url`` says otherwise.
        place: of this rank.
        agreement: of all ranks.
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
        place: Place,
        agreement: StepAgreement,
        *,
        device: torch.device,
        events: EventLog,
        recorder: Recorder | None = None,
    ) -> None:
        auto = config.every_steps == "auto" and place.rank == 0
        history = read_failure_history(attempt) if auto else FailureHistory()
        self._place = place
        self._schedule = CheckpointSchedule(config, place, device, history, recorder, events)
        self._agreement = agreement
        self._memory_every_steps = config.memory_every_steps
        self._stored_step = 0
        """The newest step that is in storage or on its way there."""
        self._not_durable: NotDurable | None = None

        def emit(event: Event) -> None:
            events.write(event)
            self._schedule.on_event(event)

        self.checkpointer = Checkpointer(
            config.url if config.url is not None else str(attempt.run / "checkpoints"),
            config,
            rank=place.rank,
            world_size=place.world_size,
            attempt_id=agreement.token(),
            on_event=emit,
        )
        """Saves and restores."""
        try:
            self.checkpointer.claim()
        except BaseException:
            self.checkpointer.abort()
            raise

    def save_if_due(self, step: int, collect: Collect, *, last: bool, wanted: bool = False) -> None:
        """Begin to save the state after ``step``, to the tiers that are due, if any.

        With ``every_steps = "auto"`` it is collective now and then.

        Args:
            step: that was just done.
            collect: gives the state.
            last: whether it is the run's last step, or this start's, which storage gets in any case.
            wanted: whether storage gets it although nothing is due. Both are the same on all ranks.
        """
        durable = last or self._schedule.due(step, saving=self.checkpointer.running) or wanted
        memory = self._memory_every_steps
        if durable or (memory > 0 and step % memory == 0):
            self._save(step, collect, durable=durable)

    def save_last(self, step: int, collect: Collect) -> None:
        """Begin to save the state after ``step``, after which there is none, unless storage has it or is to get it."""
        if step > self._stored_step:
            self._save(step, collect, durable=True)

    def read(self, which: Literal["auto"] | int, like: Mapping[str, Any] | None) -> Restored | None:
        """Read the checkpoint that the run goes on from, of whatever number of ranks. Collective.

        Args:
            which: ``"auto"``, or a step.
            like: where ranks hold parts of tensors, the running state, of which the model must be as it was saved. (A
                parameter without a gradient has no optimizer state.) None: all is read whole.

        Returns:
            The checkpoint, whose ``read_local`` reads nothing twice; None if there is none.

        Raises:
            CheckpointError: see :meth:`Checkpointer.restore`.
        """
        strict = True if like is None else ("model",)
        restored = self.checkpointer.restore(which, like=like, any_world_size=True, strict=strict)
        if restored is None:
            return None
        if not self._memory_every_steps:  # otherwise it may be in memory alone
            self._stored_step = restored.step
        own = {self._place.rank: restored.local} if restored.world_size == self._place.world_size else {}
        return replace(restored, read_local=lambda rank: own[rank] if rank in own else restored.read_local(rank))

    def note_step(self, done: StepDone) -> None:
        """Let the schedule learn from a step."""
        self._schedule.on_step(done, saving=self.checkpointer.running)

    def close(self) -> None:
        """Wait until the last save is committed or has failed, which :meth:`check_durable` tells.

        Raises:
            SnapshotMutated: see :meth:`Checkpointer.close`.
        """
        try:
            self.checkpointer.close()
        except NotDurable as failure:
            self._not_durable = failure

    def check_durable(self, what: str) -> None:
        """After :meth:`close`. Collective.

        Args:
            what: is over, in words.

        Raises:
            NotDurable: on all ranks, if the last save has failed on any.
        """
        failure = self._not_durable
        if self._agreement.maximum(int(failure is not None)):
            if failure is not None:
                raise NotDurable(f"{what}, but {failure.what}", failure.fix)
            raise NotDurable(f"{what}, but its last step is not durable", "see the message of rank 0")

    def _save(self, step: int, collect: Collect, *, durable: bool) -> None:
        if durable:
            self._stored_step = step
        now = collect(step)
        self.checkpointer.save(step, replicated=now.replicated, local=now.local, eager=now.eager, durable=durable)
