"""One call that puts compression under whatever averages a model's gradients."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from outlast.comm.auto.policy import Choice
from outlast.comm.config import CommConfig
from outlast.comm.ddp.attach import attach_ddp
from outlast.comm.deepspeed import attach_deepspeed
from outlast.comm.direction import Direction
from outlast.comm.fsdp import attach_fsdp
from outlast.comm.reducer import Reducer
from outlast.comm.transport.communicator import CollectiveObserver
from outlast.config import nearest
from outlast.deepspeed_compat import is_engine
from outlast.errors import CommError, UnknownKey


def attach(
    model_or_engine: Any,
    config: CommConfig | None = None,
    *,
    optimizer: Optimizer | None = None,
    observer: CollectiveObserver | None = None,
    direction: Direction | None = None,
    dense_direction: Direction | None = None,
    replicas: dist.ProcessGroup | None = None,
    on_choice: Callable[[Choice], None] | None = None,
    **settings: Any,
) -> Reducer:
    """Compress what a model's ranks average, from the next backward on; a collective call.

    Adam's directions (the default), with your own AdamW, or Adam, which stays what it is to the program::

        optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3, weight_decay=0.1)
        reducer = outlast.comm.attach(ddp, optimizer=optimizer, target="update", density=0.01)

    Its moments are the reducer's from then on, and its ``step()`` applies what was averaged. What it takes from the
    object, and what it refuses, is said in docs/compression.md. Without ``optimizer`` the one that steps is
    ``torch.optim.SGD``, and any other is an error, at its first step.

    Gradients, with any optimizer::

        reducer = outlast.comm.attach(ddp, target="gradient", feedback="ef21", density=0.05)

    The same call takes a model that has been through ``fully_shard`` and what ``deepspeed.initialize`` returned. What
    each of them adds is said in :func:`~outlast.comm.ddp.attach.attach_ddp`, :func:`~outlast.comm.fsdp.attach_fsdp` and
    :func:`~outlast.comm.deepspeed.attach_deepspeed`.

    Args:
        model_or_engine: a ``DistributedDataParallel`` model, an FSDP2 model (sharded completely), or a DeepSpeed
            engine, before its first backward.
        config: see :class:`CommConfig`; None takes its defaults.
        optimizer: for ``target = "update"``: ``torch.optim.AdamW`` or ``Adam``, which applies the updates. beta2 and
            eps are its own, lr and weight decay those of each of its groups at every step.
        observer: notified of every collective.
        direction: what ``target = "update"`` compresses; None takes Adam with beta1 = 0, beta2 = 0.95 (or the
            optimizer's), clip_rms = 1.
        dense_direction: the same for DDP where nothing is compressed; see :class:`GradientReducer`.
        replicas: for FSDP2 over a one-dimensional mesh: the ranks that hold copies of this rank's shards.
        on_choice: for DDP: called with what ``compressor = "auto"`` became.
        settings: fields of :class:`CommConfig`; they override those of ``config``.

    Returns:
        The reducer. Save its ``checkpoint_parts()`` with every checkpoint, on every rank.

    Raises:
        UnknownKey: there is no such setting; names the nearest one that exists.
        UnknownCompressor, OutOfRange: a setting is wrong.
        CommError: nothing averages this model's gradients yet, there is no process group, an argument does not apply to
            the model, or what it or the optimizer is set up to do cannot be compressed.
    """
    settled = _settle(config, settings)
    _check_group()
    ddp_only = {"dense_direction": dense_direction, "on_choice": on_choice}
    if isinstance(model_or_engine, DistributedDataParallel):
        _refuse("DistributedDataParallel", {"replicas": replicas})
        return attach_ddp(
            model_or_engine,
            settled,
            observer=observer,
            direction=direction,
            dense_direction=dense_direction,
            on_choice=on_choice,
            optimizer=optimizer,
        )
    if is_engine(model_or_engine):
        _refuse("a DeepSpeed engine", {"replicas": replicas, **ddp_only})
        if optimizer is not None:
            raise CommError(
                "attach: optimizer does not apply to a DeepSpeed engine, which steps partitions of its own",
                "give deepspeed.initialize a torch.optim.SGD with target = 'update', or any optimizer with target = "
                "'gradient'",
            )
        return attach_deepspeed(model_or_engine, settled, observer=observer, direction=direction)
    if _is_fsdp2(model_or_engine):
        _refuse("FSDP2", ddp_only)
        return attach_fsdp(
            model_or_engine,
            settled,
            replicas=replicas,
            observer=observer,
            direction=direction,
            optimizer=optimizer,
        )
    raise CommError(
        f"nothing averages the gradients of a {type(model_or_engine).__name__} yet",
        "wrap it in DistributedDataParallel, shard it with torch.distributed.fsdp.fully_shard, or hand over what "
        "deepspeed.initialize returned; a loop without any of them averages with outlast.comm.GradientReducer.reduce()",
    )


def _settle(config: CommConfig | None, settings: Mapping[str, Any]) -> CommConfig:
    """``config`` with ``settings`` in place of its own.

    Raises:
        UnknownKey: there is no such setting.
        UnknownCompressor, OutOfRange: a setting is wrong.
    """
    known = [field.name for field in fields(CommConfig)]
    for name in settings:
        if name not in known:
            raise UnknownKey(f"attach: no setting {name}", nearest(name, known))
    return CommConfig(**settings) if config is None else replace(config, **settings)


def _check_group() -> None:
    """Raises CommError if the environment says that there are other ranks, and there is no process group."""
    rank, ranks = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    others = rank.isdecimal() and ranks.isdecimal() and int(ranks) > 1
    if others and not dist.is_initialized():
        raise CommError(
            f"RANK={rank} and WORLD_SIZE={ranks} say that this is one of {ranks} ranks, but there is no process group, "
            "so nothing would be averaged with the others",
            "call torch.distributed.init_process_group() first, then wrap the model, then outlast.comm.attach(); for a "
            "process on its own, unset RANK and WORLD_SIZE",
        )


def _refuse(what: str, arguments: Mapping[str, object]) -> None:
    """Arguments that were given and do not apply.

    Raises:
        CommError: names the first of them.
    """
    for name, value in arguments.items():
        if value is not None:
            raise CommError(f"attach: {name} does not apply to {what}", f"leave out {name}")


def _is_fsdp2(model: Any) -> bool:
    """Whether ``fully_shard`` was applied to some module of ``model``; its package has been imported then."""
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return sharded is not None and isinstance(model, nn.Module) and any(isinstance(m, sharded) for m in model.modules())
