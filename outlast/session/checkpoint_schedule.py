"""Decides after which steps a checkpoint is saved: at a fixed interval, or when rank 0 says so."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from outlast.checkpoint import AutoInterval, CheckpointConfig
from outlast.diagnostics import Recorder
from outlast.errors import CommError
from outlast.events import CheckpointFailed, CheckpointInterval, Event, EventLog, StepDone
from outlast.launch import Place
from outlast.session.failure_history import FailureHistory

_LOG = logging.getLogger("outlast")


class CheckpointSchedule:
    """When the next checkpoint is due, the same on every rank.

    With ``every_steps = "auto"`` rank 0 measures and decides. At steps that all ranks know it broadcasts two numbers:
    whether to save now, and after how many steps to decide again.

    Args:
        config: the checkpoint settings.
        place: this rank's place.
        device: where tensors of collectives are.
        history: earlier failures of the run; used on rank 0 only.
        recorder: records the broadcasts; None where torch's own flight recorder does.
        events: where decisions are written.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        place: Place,
        device: torch.device,
        history: FailureHistory,
        recorder: Recorder | None,
        events: EventLog,
    ) -> None:
        self._every_steps = None if config.every_steps == "auto" else config.every_steps
        self._device = device
        self._alone = place.world_size == 1
        self._recorder = recorder
        self._events = events
        self._steps_to_decision = AutoInterval.FIRST_DECISION_STEPS
        self._auto_interval: AutoInterval | None = None
        if self._every_steps is None and place.rank == 0:
            trained_s = history.trained_rank_s / place.world_size
            self._auto_interval = AutoInterval(config, place.world_size, failures=history.failures, trained_s=trained_s)

    def due(self, step: int, *, saving: bool) -> bool:
        """Whether to save after ``step``; called after every step but the last.

        With ``auto`` it is collective at the steps that rank 0 announced before. When a peer is lost, it raises
        CommError within the process group's timeout.

        Args:
            step: the step that was just done.
            saving: whether a save is in progress on this rank.
        """
        if self._every_steps is not None:
            return step % self._every_steps == 0
        self._steps_to_decision -= 1
        if self._steps_to_decision > 0:
            return False
        choice = (False, 0)
        if self._auto_interval is not None:
            choice = self._auto_interval.decide(step, saving=saving)
            self._announce(step, self._auto_interval)
        decision = torch.tensor(choice, dtype=torch.int64, device=self._device)
        if not self._alone:
            self._broadcast(decision)
        now, self._steps_to_decision = decision.tolist()
        return bool(now)

    def _broadcast(self, decision: torch.Tensor) -> None:
        name = "checkpoint interval"
        token = 0 if self._recorder is None else self._recorder.enter("broadcast", decision.nbytes, name)
        try:
            dist.broadcast(decision, src=0)
        except RuntimeError as error:
            what = f"broadcast of the {name}"
            raise CommError.of_lost_peer(what, dist.get_rank(), dist.get_world_size(), error) from error
        if self._recorder is not None:
            self._recorder.complete(token)

    def on_step(self, done: StepDone, *, saving: bool) -> None:
        """Measure a step; ``saving``: whether a save is in progress at its end."""
        if self._auto_interval is not None:
            self._auto_interval.note(done.step_s, done.checkpoint_s, saving=saving)

    def on_event(self, event: Event) -> None:
        """Count failed saves among the checkpointer's events. Safe to call from any thread."""
        if self._auto_interval is not None and isinstance(event, CheckpointFailed) and event.tier == "storage":
            self._auto_interval.failed()

    def _announce(self, step: int, auto_interval: AutoInterval) -> None:
        news = auto_interval.news()
        if news is not None:
            _LOG.info("a checkpoint every %d steps: %s", news.every_steps, news.why)
            self._events.write(
                CheckpointInterval(
                    step=step, every_steps=news.every_steps, cost_s=news.cost_s, mtbf_s=news.mtbf_s, why=news.why
                )
            )
