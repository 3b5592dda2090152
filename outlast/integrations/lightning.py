"""Lightning's ``Trainer`` with a session: compression, checkpoints and exact resume, notices, events.

::

    from outlast.integrations.lightning import SessionCallback

    trainer = Trainer(max_epochs=10, strategy="ddp", devices=2, callbacks=[SessionCallback("runs/mine")])
    trainer.fit(module, data)
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from torch import Tensor

from outlast.checkpoint import CheckpointConfig
from outlast.deepspeed_compat import is_engine
from outlast.integrations.lightning_data import DataPosition
from outlast.integrations.lightning_limits import as_last, comm_for, defer_reduction, last_step_of, refuse, refuse_start
from outlast.integrations.lightning_state import TrainerPart
from outlast.launch.notice_signals import NOTICES
from outlast.session import Session
from outlast.session.compression import Comm


class SessionCallback(Checkpoint):  # type: ignore[misc]
    """Trains in a session; the last of the Trainer's callbacks, wherever it stands in the list.

    The ranks' gradients, which Lightning averages by DDP, DeepSpeed, or FSDP2 (its ``ModelParallelStrategy``), are
    compressed. Checkpoints of the whole state (model, optimizer, schedulers, error feedback, random numbers, the loops'
    progress, callbacks and the datamodule) are saved in the run's directory. Started again, ``trainer.fit(...)`` goes
    on after the newest one that verifies, at its place in the data. Events, heartbeat and notices are as in
    :class:`~outlast.session.Session`. Lightning makes no ``ModelCheckpoint`` by itself then; add one for files of
    Lightning's own.

    A step is an update, however many batches are accumulated for it. What is validated after a step is part of it, and
    so is the end of its epoch.

    Data: a plain ``DataLoader`` is resumed inside an epoch by going through the batches that were done; a loader with
    ``state_dict`` and a length, by that. The order must be a function of the epoch, of the sampler's generator, or of
    torch's random numbers, as torch's and Lightning's samplers have it.

    On a notice the step is finished and saved, and the process ends with status 75: what stands after
    ``trainer.fit(...)`` is not executed. Lightning's own handlers of these signals are set aside meanwhile.

    Args:
        run, checkpoint, resume, notice_grace_s: as for :class:`~outlast.session.Session`.
        comm: as for :class:`~outlast.session.Session`. If the Trainer clips gradients, they are compressed themselves,
            and not AdamW's updates.
        parts: further state to save, by name, as :meth:`Session.add` takes it.

    Raises:
        SessionError: ``trainer.fit(...)``, before the first step, if the Trainer is set up for what a session cannot
            serve: strategies other than DDP, FSDP2, DeepSpeed and a single device, several optimizers, compression
            under manual optimization, clipping of compressed updates, ``ckpt_path``, callbacks that replace optimizers.
        CommError: compression cannot be had, as with ZeRO 3.
        StateMismatch, CheckpointError: what is saved does not fit, or is damaged.
        RunDirectoryError, NotDurable, EndedEarly: see :class:`~outlast.session.Session`.
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | None = None,
        *,
        comm: Comm = None,
        checkpoint: CheckpointConfig | Mapping[str, Any] | Literal[False] | None = None,
        resume: Literal["auto", "never"] | int = "auto",
        notice_grace_s: float | None = 25.0,
        **parts: Any,
    ) -> None:
        super().__init__()
        self._run = run
        self._comm = comm
        self._settings: dict[str, Any] = {"checkpoint": checkpoint, "resume": resume, "notice_grace_s": notice_grace_s}
        self._parts = parts
        self._handlers: dict[int, Any] = {}
        self._evaluating = ExitStack()
        self._inside = False  # a step, whose update
        self._updated = False  # is made
        self._updates = 0  # by Lightning's count
        self._compresses = False
        self._averages = False  # weights are replaced by their averages when training ends
        self._session: Session | None = None
        self._part: TrainerPart
        self._data: DataPosition

    @property
    def session(self) -> Session:
        """The session, while the Trainer fits."""
        assert self._session is not None
        return self._session

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before other callbacks train, too."""
        if stage == "fit" and not trainer.fast_dev_run:
            refuse(trainer)
            as_last(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the session, and restore. Collective."""
        if trainer.fast_dev_run:
            return
        refuse_start(trainer)
        as_last(trainer, self)
        (optimizer,) = trainer.optimizers
        last_step = last_step_of(trainer)
        comm = comm_for(trainer, pl_module, self._comm)
        self._compresses = comm is not False and trainer.world_size > 1
        model = trainer.strategy.model
        own = None if is_engine(model) else optimizer  # DeepSpeed has it inside
        session = self._session = Session(self._run, model, own, comm=comm, **self._settings)
        if self._settings["notice_grace_s"] is not None:
            self._handlers = {number: signal.getsignal(number) for number in NOTICES}
        for number, config in enumerate(trainer.lr_scheduler_configs):
            session.add(replicated=True, **{f"scheduler_{number}": config.scheduler})
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            session.add(scaler=scaler)
        self._part, self._data = TrainerPart(trainer), DataPosition(trainer)
        self._averages = any(isinstance(one, WeightAveraging) for one in trainer.callbacks)
        session.add(**self._parts)
        session.add(replicated=False, lightning=self._part, data=self._data)
        self._updates = 0
        self._data.begin(restored=session.begin(last_step) > 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go to the place in the data. Lightning has set its handlers of signals by now, which are set aside."""
        if self._session is None:
            return
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        self._updates = trainer.global_step
        self._data.go_into_epoch()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The step that ended the epoch before has ended, with all that Lightning did then."""
        if self._session is None:
            return
        self._data.begin_epoch()
        self._part.between_epochs = True
        self._end_step()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins, unless this batch is accumulated to others."""
        if self._session is None:
            return
        if not self._inside:
            self.session.begin_step()
            self._inside, self._updated = True, False
        if trainer.accumulate_grad_batches > 1 and self._compresses:
            defer_reduction(trainer.strategy.model, trainer.fit_loop._should_accumulate())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step has ended, unless this was no update, or more is to come of it: validation, or the epoch's end."""
        if self._session is None or trainer.global_step == self._updates:
            return
        self._updates, self._updated = trainer.global_step, True
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self.session.log(loss=loss)
        self._part.between_epochs = False
        self._data.at(self._part.batches_done)
        if not self._part.more_to_come():
            self._end_step()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Of the launcher's patience."""
        if self._session is not None:
            self._evaluating.enter_context(self.session.evaluating())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A step inside an epoch has ended with its validation."""
        self._evaluating.close()
        if self._session is not None and not trainer.sanity_checking and not self._part.epoch_ends():
            self._end_step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last step has ended; it is made durable, or the Trainer raises :class:`~outlast.errors.NotDurable`."""
        if self._session is not None:
            self._part.between_epochs = True
            self._data.begin_epoch()  # if the run is asked for more, later
            self._end_step()
            self._close(None)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where there was no step left to do."""
        self._close(None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The run has ended with an error of its own."""
        self._close(exception)

    def _end_step(self) -> None:
        if not self._inside or not self._updated:
            return
        self._inside = False
        ending = self.session.end_step()
        if self._averages:
            self.session.wait_copied()
        if ending:
            self._close(None)  # with SystemExit(75), unless this was the last step

    def _close(self, error: BaseException | None) -> None:
        session, self._session = self._session, None
        self._inside = False
        self._evaluating.close()
        if session is not None:
            session.close(error)
