"""The checkpoints of a session: what they hold, and the way back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from outlast.checkpoint import CheckpointConfig, Restored
from outlast.errors import StateMismatch
from outlast.launch import Place
from outlast.session.agreement import StepAgreement
from outlast.session.deepspeed import TrainedEngine
from outlast.session.models import unwrapped
from outlast.session.place import RunPlace
from outlast.session.scheduled_checkpoints import Collected, ScheduledCheckpoints
from outlast.session.state import SessionState

_LOG = logging.getLogger("outlast")


class SessionCheckpoints(ScheduledCheckpoints):
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
        self._state = state
        super().__init__(config, run.attempt, place, agreement, device=device, events=run.events)
        try:
            for one in state.trained:
                if isinstance(one, TrainedEngine) and one.saved is not None:
                    one.saved.before_update(self.checkpointer.wait_copied)
                else:
                    self.checkpointer.watch(unwrapped(one.model), *([] if one.optimizer is None else [one.optimizer]))
        except BaseException:
            self.checkpointer.abort()
            raise

    def restore(self, which: Literal["auto"] | int) -> int:
        """Put a checkpoint back, if there is one; returns its step, or 0. Collective.

        Raises:
            CheckpointError, CommStateMismatch: see :meth:`Checkpointer.restore` and :meth:`SessionState.load`.
        """
        sharded = [one for one in self._state.trained if one.is_sharded]
        fresh = [one.optimizer for one in sharded if one.optimizer is not None and not one.optimizer.state]
        restored = self._read_shards(which) if sharded else self.read(which, None)
        if restored is None:
            for optimizer in fresh:
                optimizer.state.clear()  # torch has let it make a step of zeros, to have something to read into
            return 0
        anew = self._state.load(restored, rank=self._place.rank, world_size=self._place.world_size)
        for what in anew:
            _LOG.warning("step %d: %s", restored.step, what)
        return restored.step

    def _read_shards(self, which: Literal["auto"] | int) -> Restored | None:
        """As :meth:`read`, where ranks hold parts of tensors and read no more than these; that takes the state as it
        is now. The program's own parts may have had other tensors when they were saved, so they are read whole, unless
        they hold parts of tensors themselves."""
        like = self._state.collect().replicated
        parts = like.pop("parts", {})
        kept = {name: state for name, state in parts.items() if _has_dtensors(state)}
        restored = self.read(which, like | ({"parts": kept} if kept else {}))
        if restored is None or len(kept) == len(parts):
            return restored
        try:
            whole = self.checkpointer.restore(restored.step, parts=("parts",), any_world_size=True)
        except StateMismatch:  # it has none
            return restored
        assert whole is not None
        own = {name: state for name, state in whole.replicated.get("parts", {}).items() if name not in kept}
        read = restored.replicated.get("parts", {})
        return replace(restored, replicated={**restored.replicated, "parts": {**own, **read}})

    def finish(self, step: int) -> None:
        """Make the state after ``step`` durable, and end. Collective.

        Raises:
            NotDurable: on all ranks, if the last save failed.
            SnapshotMutated: see :meth:`Checkpointer.close`.
        """
        self.save_last(step, self.collect)
        self.close()
        self.check_durable("the session has ended")

    def collect(self, step: int) -> Collected:
        """The state after ``step``.

        Raises:
            SessionError: see :meth:`Trained.check_unchanged`.
        """
        for one in self._state.trained:
            one.check_unchanged()
        return self._state.collect()


def _has_dtensors(state: Any) -> bool:
    if isinstance(state, Mapping):
        return any(map(_has_dtensors, state.values()))
    if isinstance(state, (list, tuple)):
        return any(map(_has_dtensors, state))
    return hasattr(state, "full_tensor")
