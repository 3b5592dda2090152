"""What a session cannot serve under Lightning, and what it is told of the Trainer's settings."""

from __future__ import annotations

import lightning.pytorch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule

from outlast.errors import SessionError
from outlast.session.compression import Comm, is_of_updates, of_gradients

_STEP_OUTSIDE = (LearningRateFinder, BatchSizeFinder)
_REPLACE_OPTIMIZERS = (StochasticWeightAveraging, BaseFinetuning)


def refuse(trainer: Trainer) -> None:
    """Raise SessionError if the Trainer is made for what a session cannot serve."""
    fit = trainer.fit_loop
    needed = [(fit, "_data_fetcher"), (fit, "_combined_loader"), (fit, "epoch_progress")]
    needed += [(fit.epoch_loop, name) for name in ("_should_check_val_fx", "_num_ready_batches_reached")]
    lacking = [name for holder, name in needed if not hasattr(holder, name)]
    if lacking:
        raise SessionError(
            f"Lightning {lightning.pytorch.__version__} has loops that a session does not know: they have no "
            f"{', '.join(lacking)}",
            "use Lightning 2.6",
        )
    strategy = trainer.strategy
    if not isinstance(strategy, (DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy)):  # DeepSpeed's is a DDP
        raise SessionError(
            f"SessionCallback under {type(strategy).__name__}",
            'use strategy="ddp", "deepspeed", a single device, or ModelParallelStrategy with fully_shard in '
            "configure_model (FSDP2)",
        )
    if isinstance(strategy, ModelParallelStrategy) and (parts := strategy.device_mesh["tensor_parallel"].size()) > 1:
        raise SessionError(
            f"SessionCallback under ModelParallelStrategy with tensor_parallel_size = {parts}",
            f"set ModelParallelStrategy(data_parallel_size={trainer.world_size}, tensor_parallel_size=1)",
        )
    started = getattr(strategy, "_start_method", "popen")
    if started != "popen":
        raise SessionError(
            f"SessionCallback with processes that are made by {started}: their exit status is lost",
            'use strategy="ddp", or start the script with outlast launch or torchrun',
        )
    for callback in trainer.callbacks:
        if isinstance(callback, _STEP_OUTSIDE):
            raise SessionError(
                f"SessionCallback with {type(callback).__name__}, whose trial steps are none of the run's",
                "find the value first, with a Trainer of its own",
            )
        if isinstance(callback, _REPLACE_OPTIMIZERS):
            raise SessionError(
                f"SessionCallback with {type(callback).__name__}, which replaces what is saved while it trains",
                "leave it out; for averaged weights use Lightning's WeightAveraging",
            )


def as_last(trainer: Trainer, session: Callback) -> None:
    """Have the session's callback be the last one: what a later one changes after a step would be in no checkpoint.

    Raises:
        SessionError: there are several.
    """
    others = [one for one in trainer.callbacks if one is not session]
    if any(isinstance(one, type(session)) for one in others):
        raise SessionError("the Trainer has several SessionCallbacks, and a run is one session's", "leave one")
    trainer.callbacks = [*others, session]  # another list, as Lightning is going through this one


def defer_reduction(model: nn.Module, deferred: bool) -> None:
    """With FSDP2: whether the next backward only accumulates, so that a step is averaged once."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(not deferred, recurse=False)


def refuse_start(trainer: Trainer) -> None:
    """The same, once the optimizers are there."""
    if trainer.ckpt_path:
        raise SessionError(
            f"trainer.fit(ckpt_path={str(trainer.ckpt_path)!r}) with SessionCallback, which restores by itself",
            "leave ckpt_path out; to begin with weights from a file, load them into the module before",
        )
    if len(trainer.optimizers) != 1:
        raise SessionError(
            f"SessionCallback: configure_optimizers gave {len(trainer.optimizers)} optimizers",
            "use one; for several, outlast.Session in a loop of your own, as in examples/gan.py",
        )


def comm_for(trainer: Trainer, module: LightningModule, comm: Comm) -> Comm:
    """The settings of compression, with the target that suits the Trainer.

    Raises:
        SessionError: there is none.
    """
    if comm is False or trainer.world_size == 1:
        return comm
    if not module.automatic_optimization:
        raise SessionError(
            "SessionCallback: compression under manual optimization, where a step may average more than once",
            "set comm=False, or automatic_optimization = True",
        )
    if getattr(trainer.strategy, "_ddp_comm_hook", None) is not None:
        raise SessionError(
            "SessionCallback: DDPStrategy has a ddp_comm_hook, and DDP takes one", "leave it out, or set comm=False"
        )
    if not trainer.gradient_clip_val:
        return comm
    if is_of_updates(comm):
        raise SessionError(
            f"SessionCallback: gradient_clip_val = {trainer.gradient_clip_val} would clip averaged updates",
            'leave clipping out, or compress gradients: comm={"target": "gradient", "feedback": "ef21"}',
        )
    return of_gradients(comm)


def last_step_of(trainer: Trainer) -> int:
    """The number of the run's last update, or a bound of it.

    Raises:
        SessionError: there is none.
    """
    if trainer.max_steps != -1:
        return int(trainer.max_steps)
    steps = trainer.estimated_stepping_batches
    if steps == float("inf") or steps < 0:
        raise SessionError(
            "SessionCallback: neither the data nor the Trainer has an end",
            "set Trainer(max_steps=...), which may be more than there will be; max_epochs ends it as well",
        )
    return int(steps)
