"""Hugging Face's ``Trainer`` with a session: compression, checkpoints and exact resume, notices, events.

``train(trainer, "runs/mine")`` stands in place of ``trainer.train()``; an example is ``examples/hf_trainer.py``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from outlast.checkpoint import CheckpointConfig
from outlast.errors import SessionError
from outlast.integrations.session_callback import SessionCallback, WentElsewhere
from outlast.integrations.trainer_state import Position
from outlast.integrations.wrappers import bare_optimizer, is_engines, refuse_sharding, without_compile
from outlast.session import Session
from outlast.session.compression import Comm, is_of_updates, of_gradients
from outlast.session.saved_parts import newest_parts


def train(
    trainer: Trainer,
    run: str | os.PathLike[str] | None = None,
    *,
    comm: Comm = None,
    checkpoint: CheckpointConfig | Mapping[str, Any] | Literal[False] | None = None,
    resume: Literal["auto", "never"] | int = "auto",
    notice_grace_s: float | None = 25.0,
    **parts: Any,
) -> TrainOutput:
    """Train as ``trainer.train()`` does, in a session; in place of it, and of ``resume_from_checkpoint``.

    The ranks' gradients, which the Trainer averages by DDP, FSDP2 or DeepSpeed, are compressed. Checkpoints of the
    whole state (model, optimizer, scheduler, error feedback, random numbers, the Trainer's counters and log history)
    are saved in the run's directory, besides those that the Trainer saves itself (``save_strategy``). Started again,
    the run goes on after the newest one that verifies, at its place in the data. Events, heartbeat and notices are as
    in :class:`Session`.

    Clipping: with ``max_grad_norm`` above 0, which is the Trainer's default, gradients are compressed with EF21, and
    the Trainer clips their average. With ``max_grad_norm=0``, AdamW's and Adam's updates are compressed; under
    DeepSpeed gradients are in either case, and ZeRO 3 cannot compress: it needs ``comm=False``.

    On a notice the step is finished and saved, an evaluation that is due is left out, and the process ends with status
    75: what stands after this call is not executed.

    Args:
        trainer: before it has trained. A single process, DDP, FSDP2, or DeepSpeed's ZeRO 0 to 3; with ``accelerate``
            1.x.
        run, checkpoint, resume, notice_grace_s: as for :class:`Session`.
        comm: as for :class:`Session`; a dictionary without ``target`` is completed as said above.
        parts: further state to save, by name, as :meth:`Session.add` takes it.

    Returns:
        What ``trainer.train()`` returns.

    Raises:
        SessionError: the Trainer is set up for what a session cannot serve: FSDP of version 1, tensor parallelism,
            DataParallel, ``auto_find_batch_size``; or it clips, and updates were to be compressed; or it uses DDP where
            FSDP or DeepSpeed was asked for, as it does on CPUs.
        CommError: compression cannot be had, as with ZeRO 3.
        StateMismatch, CheckpointError: what is saved does not fit, or is damaged.
        RunDirectoryError, NotDurable, EndedEarly: see :class:`Session`.
    """
    _refuse(trainer)
    comm = _comm_for(trainer, comm)
    position = Position.of(*newest_parts(run, checkpoint=checkpoint, resume=resume))
    prepared = False
    while True:

        def open_session(which: Literal["auto", "never"] | int = resume) -> Session:
            model = without_compile(trainer.model_wrapped)
            session = Session(
                run,
                model,
                bare_optimizer(model, trainer.optimizer),
                comm=comm,
                checkpoint=checkpoint,
                resume=which,
                notice_grace_s=notice_grace_s,
            )
            try:
                session.add(**parts)
                if trainer.lr_scheduler is not None and not is_engines(trainer.lr_scheduler):
                    session.add(scheduler=trainer.lr_scheduler)
                if trainer.accelerator.scaler is not None:
                    session.add(scaler=trainer.accelerator.scaler)
            except SessionError as error:
                session.close(error)
                raise
            return session

        try:
            return _train(trainer, SessionCallback(trainer, position, open_session), position, prepared)
        except WentElsewhere as elsewhere:
            position, resume = elsewhere.position, elsewhere.position.step or "never"
            prepared = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
            if not prepared:
                trainer.model_wrapped = trainer.model  # DDP takes one hook, so it is wrapped anew


def _train(trainer: Trainer, callback: SessionCallback, position: Position, prepared: bool) -> TrainOutput:
    trainer.add_callback(callback)
    try:
        with position.told(trainer, prepared=prepared) as folder:
            output = trainer.train(resume_from_checkpoint=folder)
    except BaseException as error:
        callback.end(error)
        raise
    finally:
        trainer.remove_callback(callback)
    callback.end(None)
    return output


def _refuse(trainer: Trainer) -> None:
    """Raise SessionError if the Trainer is set up for what a session cannot serve."""
    args = trainer.args
    refuse_sharding(trainer.accelerator, "the Trainer", fsdp=bool(args.fsdp), deepspeed=bool(args.deepspeed))
    refused = {
        "auto_find_batch_size": (args.auto_find_batch_size, "choose per_device_train_batch_size"),
        "DataParallel": (args.n_gpu > 1, "start one process for each GPU: outlast launch --nproc-per-node GPUS"),
        "a model in parts on several devices": (trainer.is_model_parallel, "train with DDP, one device a process"),
    }
    for what, (is_so, fix) in refused.items():
        if is_so:
            raise SessionError(f"the Trainer uses {what}, which a session does not serve", fix)


def _comm_for(trainer: Trainer, comm: Comm) -> Comm:
    """How gradients are compressed, so that what the Trainer clips is a gradient.

    Raises:
        SessionError: updates were to be compressed, and the Trainer clips.
    """
    if trainer.args.max_grad_norm <= 0:
        return comm
    if is_of_updates(comm):
        raise SessionError(
            f"comm.target = 'update' with max_grad_norm = {trainer.args.max_grad_norm:g}: what ranks average is an "
            "update then, which must not be clipped like a gradient",
            "set TrainingArguments(max_grad_norm=0), or compress gradients: comm={'target': 'gradient', 'feedback': "
            "'ef21'}",
        )
    return of_gradients(comm)
