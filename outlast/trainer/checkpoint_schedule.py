"""After which steps checkpoints are begun: every so many, or when rank 0 says so."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from outlast.checkpoint import AutoInterval, CheckpointConfig
from outlast.diagnostics import Recorder
from outlast.events import CheckpointFailed, CheckpointInterval, Event, EventLog, StepDone
from outlast.launch import Place
from outlast.trainer.failure_history import History

_LOG = logging.getLogger("outlast")


class Schedule:
    """When the next checkpoint is due, the same on every rank.

    With ``every_steps = "auto"`` rank 0 measures and decides, and the others hear of it in a broadcast of two numbers
    at steps that all of them know: whether to save now, and after how many steps to look again.

    Args:
        config: of checkpoints.
        place: this rank's.
        device: of tensors in collectives.
        history: of the run; looked at on rank 0 only.
        recorder: told of the broadcasts.
        events: takes what was decided.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        place: Place,
        device: torch.device,
        history: History,
        recorder: Recorder,
        events: EventLog,
    ) -> None:
        self._every_steps = None if config.every_steps == "auto" else config.every_steps
        self._device = device
        self._recorder = recorder
        self._events = events
        self._look_in = AutoInterval.FIRST_DECISION_STEPS
        self._pace: AutoInterval | None = None
        if self._every_steps is None and place.rank == 0:
            trained_s = history.trained_rank_s / place.world_size
            self._pace = AutoInterval(config, place.world_size, failures=history.failures, trained_s=trained_s)

    def due(self, step: int, *, saving: bool) -> bool:
        """Whether to save after ``step``; called for each step but the last. With ``auto`` it may be collective.

        Args:
            step: just done.
            saving: whether a save is under way on this rank.
        """
        if self._every_steps is not None:
            return step % self._every_steps == 0
        self._look_in -= 1
        if self._look_in > 0:
            return False
        order = (False, 0)
        if self._pace is not None:
            order = self._pace.decide(step, saving=saving)
            self._tell(step, self._pace)
        words = torch.tensor(order, dtype=torch.int64, device=self._device)
        token = self._recorder.enter("broadcast", words.nbytes, "checkpoint interval")
        dist.broadcast(words, src=0)
        self._recorder.complete(token)
        now, self._look_in = words.tolist()
        return bool(now)

    def note(self, done: StepDone, *, saving: bool) -> None:
        """A step was done; ``saving``: whether a save is under way at its end."""
        if self._pace is not None:
            self._pace.note(done.step_s, done.checkpoint_s, saving=saving)

    def hear(self, event: Event) -> None:
        """What the checkpointer tells; from any thread."""
        if self._pace is not None and isinstance(event, CheckpointFailed) and event.tier == "storage":
            self._pace.failed()

    def _tell(self, step: int, pace: AutoInterval) -> None:
        news = pace.news()
        if news is not None:
            _LOG.info("a checkpoint every %d steps: %s", news.every_steps, news.why)
            self._events.write(
                CheckpointInterval(
                    step=step, every_steps=news.every_steps, cost_s=news.cost_s, mtbf_s=news.mtbf_s, why=news.why
                )
            )
