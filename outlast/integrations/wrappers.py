"""What Accelerate and torch.compile have put around models and optimizers, and what of it a session cannot serve."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DeepSpeedSchedulerWrapper, DistributedType
from torch.optim import Optimizer

from outlast.deepspeed_compat import is_engine
from outlast.errors import SessionError

_FSDP2 = (
    "use FSDP2: TrainingArguments(fsdp_config={'version': 2}), FullyShardedDataParallelPlugin(fsdp_version=2), or "
    "accelerate launch --fsdp_version 2"
)
_SERVED = (
    DistributedType.NO,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_CPU,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
)


def without_compile(model: Any) -> Any:
    """The model without torch.compile around it; DDP stays."""
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod
    return model


def bare_optimizer(model: Any, optimizer: Optimizer | None) -> Optimizer | None:
    """The optimizer that Accelerate has wrapped; None if the model is a DeepSpeed engine, which has it inside."""
    if is_engine(model):
        return None
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def is_engines(scheduler: Any) -> bool:
    """Whether a scheduler is a DeepSpeed engine's, which steps and saves it."""
    return isinstance(scheduler, DeepSpeedSchedulerWrapper)


def refuse_sharding(accelerator: Accelerator, who: str, *, fsdp: bool, deepspeed: bool) -> None:
    """Raise SessionError if the model is shared out in a way that a session cannot serve, or is not, against the will.

    Args:
        accelerator: of whom.
        who: in words.
        fsdp: whether FSDP was asked for.
        deepspeed: whether DeepSpeed was.
    """
    kind = accelerator.distributed_type
    if kind is DistributedType.FSDP and not accelerator.is_fsdp2:
        raise SessionError(f"{who} uses FSDP of version 1, whose flat parameters a session does not serve", _FSDP2)
    if kind not in _SERVED:
        raise SessionError(
            f"{who} uses {kind.value}, which a session does not serve", "use DDP, FSDP2 or DeepSpeed's ZeRO"
        )
    for asked, name, made in (
        (fsdp, "FSDP", DistributedType.FSDP),
        (deepspeed, "DeepSpeed", DistributedType.DEEPSPEED),
    ):
        if asked and kind is not made:
            raise SessionError(
                f"{who} was asked for {name}, and Accelerate has made {kind.value} of it, with {accelerator.device}: "
                f"it has {name} on accelerators alone",
                f"train on GPUs, without use_cpu and cpu=True; or leave {name} out",
            )
