"""The checkpoints of a session: what they hold, and the way back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from outlast.checkpoint import CheckpointConfig, Restored
from outlast.errors import StateMismatch
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
        like = self._state.like()
        restored = self.read(which, None) if like is None else self._read_shards(which, like)
        if restored is None:
            return 0
        anew = self._state.load(restored, rank=self._place.rank, world_size=self._place.world_size)
        for what in anew:
            _LOG.warning("step %d: %s", restored.step, what)
        return restored.step

    def _read_shards(self, which: Literal["auto"] | int, like: Mapping[str, Any]) -> Restored | None:
        """As :meth:`read`. The program's own parts may have had other tensors when they were saved than now, so they
        are read whole, unless they hold parts of tensors themselves."""
        parts = like.get("parts", {})
        kept = {name: state for name, state in parts.items() if _has_dtensors(state)}
        rest = {key: value for key, value in like.items() if key != "parts"}
        restored = self.read(which, rest | ({"parts": kept} if kept else {}))
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


def _has_dtensors(state: Any) -> bool:
    if isinstance(state, Mapping):
        return any(map(_has_dtensors, state.values()))
    if isinstance(state, (list, tuple)):
        return any(map(_has_dtensors, state))
    return hasattr(state, "full_tensor")
