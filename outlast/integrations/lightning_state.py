"""What a checkpoint holds of Lightning's Trainer: loops, callbacks, datamodule, precision, and what hooks add."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops import _Loop

_LOG = logging.getLogger("outlast")
_PROGRESS = "epoch_progress"


class TrainerPart:
    """The Trainer's own state, as a part of a session.

    Weights, optimizers and schedulers are the session's. Callbacks and modules that put something of their own into
    Lightning's checkpoints (``on_save_checkpoint``) find it again.

    Args:
        trainer: while it fits.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.between_epochs = False
        """Whether an epoch has ended and the next one has not begun; otherwise a batch of one has ended."""

    @property
    def batches_done(self) -> int:
        """How many batches of this epoch were trained on."""
        return int(self._trainer.fit_loop.epoch_loop.batch_progress.current.processed)

    def epoch_ends(self) -> bool:
        """Whether the batch that was trained on last is the last one of its epoch."""
        return bool(self._trainer.fit_loop.epoch_loop._num_ready_batches_reached())

    def more_to_come(self) -> bool:
        """Whether validation or the end of the epoch follows the batch that was trained on last."""
        fit = self._trainer.fit_loop
        return self.epoch_ends() or bool(fit.epoch_loop._should_check_val_fx(fit._data_fetcher))

    def state_dict(self) -> dict[str, Any]:
        """Of this rank. Callbacks' ``state_dict`` and ``on_save_checkpoint`` are called, and the module's."""
        trainer, module = self._trainer, self._trainer.lightning_module
        handed = self._handed()
        given = {id(value): key for key, value in handed.items()}
        handed["callbacks"] = {one.state_key: one.state_dict() for one in trainer.callbacks}
        for callback in trainer.callbacks:
            callback.on_save_checkpoint(trainer, module, handed)
        module.on_save_checkpoint(handed)
        loops = copy.deepcopy(trainer.fit_loop.state_dict())
        loops["state_dict"].pop("combined_loader", None)  # the loaders' places are saved apart
        if self.between_epochs:
            for which in ("total", "current"):
                loops[_PROGRESS][which]["ready"] = loops[_PROGRESS][which]["started"]
        return {
            "between_epochs": self.between_epochs,
            "loops": loops,
            "callbacks": {key: state for key, state in handed.pop("callbacks").items() if state},
            "precision": trainer.precision_plugin.state_dict() or {},
            "datamodule": {} if trainer.datamodule is None else trainer.datamodule.state_dict(),
            # What is the session's is not saved again, though hooks have it under other names.
            "same": {key: given[id(value)] for key, value in handed.items() if given.get(id(value), key) != key},
            "added": {key: value for key, value in handed.items() if id(value) not in given},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put it back, before the Trainer's loops begin."""
        trainer, module = self._trainer, self._trainer.lightning_module
        states = state["callbacks"]
        handed = self._handed() | {"callbacks": dict(states)}
        handed |= {key: handed[of] for key, of in state["same"].items()} | dict(state["added"])
        module.on_load_checkpoint(handed)
        if trainer.datamodule is not None and state["datamodule"]:
            trainer.datamodule.load_state_dict(state["datamodule"])
        absent = sorted(states.keys() - {one.state_key for one in trainer.callbacks})
        if absent:
            _LOG.warning("the checkpoint has the state of callbacks that the Trainer has not: %s", ", ".join(absent))
        for callback in trainer.callbacks:
            callback.on_load_checkpoint(trainer, module, handed)
        for callback in trainer.callbacks:
            if states.get(callback.state_key):
                callback.load_state_dict(copy.deepcopy(states[callback.state_key]))
        if state["precision"]:
            trainer.precision_plugin.load_state_dict(state["precision"])
        trainer.fit_loop.load_state_dict(state["loops"])
        if state["between_epochs"]:  # nothing is to be finished, so the loops begin the next epoch as they always do
            _forget_restart(trainer.fit_loop)

    def _handed(self) -> dict[str, Any]:
        """What Lightning hands to hooks, without the optimizers' states."""
        trainer = self._trainer
        return {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "state_dict": trainer.strategy.lightning_module_state_dict(),
            "loops": {"fit_loop": trainer.fit_loop.state_dict()},
            "optimizer_states": [],
            "lr_schedulers": [],
        }


def _forget_restart(loop: _Loop) -> None:
    loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
    for inner in vars(loop).values():
        if isinstance(inner, _Loop):
            _forget_restart(inner)
