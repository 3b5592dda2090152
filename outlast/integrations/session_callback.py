"""The callback by which a Hugging Face Trainer drives a session."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from outlast.checkpoint.rng import load_rng_state, rng_state
from outlast.integrations.trainer_state import Position, TrainerPart
from outlast.session import Session

_LOG = logging.getLogger("outlast")
_LOOKS = 3
"""Fetches of batches that are looked at for what they draw."""


class WentElsewhere(Exception):
    """The session restored another step than the Trainer was told: the newest one is damaged, or is in memory alone."""

    def __init__(self, position: Position) -> None:
        super().__init__(f"goes on after step {position.step}")
        self.position = position


class SessionCallback(TrainerCallback):  # type: ignore[misc]
    """Opens a session when the Trainer's model is wrapped, and tells it the Trainer's steps.

    A step ends where the next one begins, or training does: what the Trainer logs, evaluates and counts after its
    update is part of it, and is in its checkpoint. By then the next batches have been fetched, and at this very place
    the random-number states are put back.

    Args:
        trainer: that trains.
        position: where it was told to go on.
        open_session: makes the session, with all its parts added but the Trainer's.
    """

    def __init__(self, trainer: Trainer, position: Position, open_session: Callable[[], Session]) -> None:
        self._trainer = trainer
        self._position = position
        self._open_session = open_session
        self._part = TrainerPart(trainer)
        self._rng: dict[str, Any] | None = None  # to put back when the next batches are there
        self._inside = False
        self._evaluating = ExitStack()
        self._is_evaluating = False
        self._before_fetch: Any = None
        self._looks = 0
        self.session: Session | None = None

    @property
    def _running(self) -> Session:
        assert self.session is not None
        return self.session

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore.

        Raises:
            WentElsewhere: another step than the Trainer was told.
        """
        session = self.session = self._open_session()
        session.add(replicated=True, trainer=self._part)
        done = session.begin(state.max_steps)
        if done != self._position.step:
            raise WentElsewhere(Position(done, self._part.restored))
        if done:
            self._rng = rng_state()
            # Shown as a later one where the run is done; see Position.
            state.global_step = self._trainer._initial_global_step = self._trainer._globalstep_last_logged = done

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Of an epoch whose batches had not been fetched: the loader draws at its start what it would have drawn."""
        self._before_fetch = None
        if self._rng is not None and not self._position.fetched and float(state.epoch).is_integer():
            load_rng_state(self._rng)
            self._rng = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the step before, and begin this one; end the process if a notice came."""
        self._look_at_fetch()
        if self._rng is not None:
            load_rng_state(self._rng)
            self._rng = None
        self._end_step(fetched=True)
        if self._running.ending:
            self._running.close()
        self._running.begin_step()
        self._inside = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluation comes next, if it is due; not after a notice."""
        self._prepare_evaluation(state, control)
        if self._looks < _LOOKS and not control.should_evaluate and not control.should_save:
            self._before_fetch = _drawn()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """If the model is replaced by the best one when training ends, the last step's is saved before."""
        self._before_fetch = None
        self._prepare_evaluation(state, control)
        ends = control.should_training_stop or state.global_step >= state.max_steps
        if ends and args.load_best_model_at_end:
            self._end_step(fetched=False)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An evaluation that was not announced."""
        self._begin_evaluation()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """It has ended."""
        self._evaluating.close()
        self._is_evaluating = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """The Trainer's numbers are the step's."""
        if self._inside:
            numbers = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, (int, float))}
            self._running.log(**numbers)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the last step durable."""
        self._end_step(fetched=False)
        self._running.close()

    def end(self, error: BaseException | None) -> None:
        """Training has ended, with this error or without one."""
        if self.session is not None:
            self.session.close(error)

    def _end_step(self, *, fetched: bool) -> None:
        if self._inside:
            self._inside = False
            self._part.fetched = fetched
            self._running.end_step()

    def _prepare_evaluation(self, state: TrainerState, control: TrainerControl) -> None:
        if not control.should_evaluate:
            return
        if self._inside and self._running.notice_came():
            control.should_evaluate = False
            if self._running.rank == 0:
                _LOG.warning("evaluation after step %d is left out: a notice came, and comes first", state.global_step)
            return
        self._begin_evaluation()

    def _begin_evaluation(self) -> None:
        if not self._is_evaluating and self.session is not None:
            self._is_evaluating = True
            self._evaluating.enter_context(self.session.evaluating())

    def _look_at_fetch(self) -> None:
        """Warn of a data loader whose batches depend on the generators that are put back only after it has fetched."""
        before, self._before_fetch = self._before_fetch, None
        if before is None or self._looks >= _LOOKS:
            return
        self._looks += 1
        if before != _drawn():
            self._looks = _LOOKS
            _LOG.warning(
                "batches are drawn with the global random-number generators (by a collator that masks, say): some are "
                "fetched ahead, and drawn anew after a resume, which is not exact then; draw from a generator that "
                "depends on the example alone"
            )


def _drawn() -> Any:
    """Equal if nothing was drawn in between."""
    _, keys, position, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.asarray(keys).tobytes(), position, rest
