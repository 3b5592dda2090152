"""A Hugging Face Trainer's place in its run: how a checkpoint holds it, and how the Trainer is told."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from outlast.checkpoint.peers.collectives import Agreement
from outlast.errors import SessionError, StateMismatch

_LOAD, _PREPARE = "_load_from_checkpoint", "_prepare_for_training"
"""The methods by which a Trainer loads from a folder: before it wraps the model, and after."""


class TrainerPart:
    """The Trainer's own state, as a part of a session: its counters, log history and callbacks' states, as JSON.

    Args:
        trainer: while it trains.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.fetched = False
        """Whether the next step's batches were fetched, so that the loader has drawn what it draws at its start."""
        self.restored: dict[str, Any] = {}
        """What was loaded last."""

    def state_dict(self) -> dict[str, Any]:
        """Rank 0's, on all ranks, as times in the log history differ. Collective over the default process group."""
        trainer = self._trainer
        trainer.store_flos()
        stateful = [
            one for one in [*trainer.callback_handler.callbacks, trainer.control] if isinstance(one, ExportableState)
        ]
        state = dataclasses.replace(trainer.state, stateful_callbacks=stateful)
        agreement = Agreement(None, trainer.args.process_index, trainer.args.world_size)
        text = agreement.broadcast_text(json.dumps(dataclasses.asdict(state)))
        return {"json": text, "fetched": self.fetched}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember it; the Trainer has read it before."""
        self.restored = dict(state)


@dataclass(frozen=True, slots=True)
class Position:
    """Where a Trainer goes on."""

    step: int
    """The last step that is done; 0: it begins."""
    state: Mapping[str, Any]
    """What :meth:`TrainerPart.state_dict` returned after it."""

    @classmethod
    def of(cls, step: int, parts: Mapping[str, Any]) -> Position:
        """From a checkpoint's parts.

        Raises:
            StateMismatch: no Trainer saved this.
        """
        if step and "trainer" not in parts:
            raise StateMismatch(
                f"the checkpoint of step {step} was not saved by a Trainer: it has {', '.join(sorted(parts))}",
                "give train() another run directory",
            )
        return cls(step, parts.get("trainer", {}))

    @property
    def fetched(self) -> bool:
        """See :class:`TrainerPart`."""
        return bool(self.state.get("fetched"))

    @contextmanager
    def told(self, trainer: Trainer, *, prepared: bool = False) -> Iterator[str | None]:
        """A folder for ``trainer.train(resume_from_checkpoint=...)`` that says where to go on, and has no weights:
        these are the session's to load, once they are wrapped. None if the run begins.

        Args:
            trainer: that is about to train.
            prepared: whether it has wrapped model and optimizer before, and is to keep them.

        Raises:
            SessionError: this version of transformers loads weights in another way.
            StateMismatch: the run has done more steps than the Trainer is to do.
        """
        lacking = [name for name in (_LOAD, _PREPARE) if not callable(getattr(trainer, name, None))]
        if self.step and lacking:
            raise SessionError(
                f"this version of transformers has no Trainer.{lacking[0]}, so its Trainer cannot be told where to go "
                "on",
                "use transformers 5",
            )

        def prepare(max_steps: int, loader: Any, folder: str | None) -> Any:
            if prepared:
                return trainer.model_wrapped, loader
            return getattr(type(trainer), _PREPARE)(trainer, max_steps, loader, None)

        with ExitStack() as stack:
            if prepared:
                stack.enter_context(_instead(trainer.accelerator, free_memory=lambda *kept: list(kept)))
            if self.step or prepared:
                stack.enter_context(_instead(trainer, **{_LOAD: _load_nothing, _PREPARE: prepare}))
            yield stack.enter_context(self._folder(trainer)) if self.step else None

    @contextmanager
    def _folder(self, trainer: Trainer) -> Iterator[str]:
        state = json.loads(self.state["json"])
        if state["global_step"] >= state["max_steps"]:
            state["global_step"] = self._shown_step(trainer)
        with tempfile.TemporaryDirectory(prefix="outlast-") as folder:
            (Path(folder) / TRAINER_STATE_NAME).write_text(json.dumps(state))
            yield folder

    def _shown_step(self, trainer: Trainer) -> int:
        """Of a run that was done: one before which the Trainer has no epoch left, if it still is; with the true one
        it would train a step more."""
        epochs, steps_per_epoch, _, _, _, _, last = trainer.set_initial_training_values(
            trainer.args, trainer.get_train_dataloader()
        )
        if self.step > last:
            raise StateMismatch(
                f"the checkpoint is of step {self.step}, but the Trainer ends at step {last}",
                "ask for more steps, or go on from an earlier checkpoint with train(..., resume=STEP)",
            )
        return self.step if self.step < last else epochs * steps_per_epoch


def _load_nothing(resume_from_checkpoint: str, model: Any = None) -> None:
    """In place of the Trainer's own."""


@contextmanager
def _instead(holder: Any, **methods: Any) -> Iterator[None]:
    """These in place of an object's own methods."""
    vars(holder).update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vars(holder)[name]
