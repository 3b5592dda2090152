"""What engines have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from outlast.checkpoint import check_like
from outlast.comm import CollectiveObserver, Reducer, ReduceStats
from outlast.errors import StateMismatch, TrainingDiverged
from outlast.trainer.engines.base import UpdateStats


@contextmanager
def recorded(observer: CollectiveObserver | None, label: str) -> Iterator[None]:
    """Record a forward and backward as one collective of all ranks, where a library issues some that nobody sees.

    A rank that waits in there for a peer, which never began, is told from that peer.
    """
    token = None if observer is None else observer.enter("forward_backward", 0, label)
    yield
    if observer is not None and token is not None:
        observer.complete(token)


def own_buffers(saved: dict[str, Tensor], local: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a saved model, with a rank's own buffers, if they were saved, in place of rank 0's."""
    own = local.get("buffers", {})
    return {name: own.get(name, tensor) for name, tensor in saved.items()}


def load_tensors(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Copy a saved model's tensors into parameters and buffers.

    Raises:
        StateMismatch: names what does not match; nothing was copied.
    """
    running = dict(model.named_parameters()) | dict(model.named_buffers())
    check_like(saved, running)
    with torch.no_grad():
        for name, tensor in running.items():
            tensor.copy_(saved[name])


def load_comm(
    reducer: Reducer, comm: Mapping[str, Any], read_local: Callable[[int], Mapping[str, Any]], ranks: int
) -> None:
    """Load what :meth:`Reducer.checkpoint_parts` was on each of ``ranks`` ranks.

    Raises:
        CommStateMismatch: see :meth:`Reducer.load_resharded`.
    """

    def read(rank: int) -> Mapping[str, Any]:
        return {"replicated": comm["aggregate"], "meta": comm["meta"], "local": read_local(rank)["comm"]}

    reducer.load_resharded(read, ranks)


def check_norm(step: int, norm: float, what: str) -> None:
    """Raise unless the norm of what was averaged is finite; nothing has been updated yet.

    Raises:
        TrainingDiverged: it is not.
    """
    if not math.isfinite(norm):
        raise TrainingDiverged(
            f"step {step}: the {what} norm is {norm}; the parameters were not updated",
            "lower optim.lr, lengthen optim.warmup_steps, or resume from an earlier step with --resume STEP",
        )


def clip(step: int, parameters: Iterable[nn.Parameter], most: float, what: str) -> float:
    """The norm of all gradients, to which they are then clipped. With shards it is collective.

    Args:
        step: its number.
        parameters: that have averaged gradients.
        most: the norm to clip to; infinity clips nothing.
        what: was averaged.

    Raises:
        TrainingDiverged: it is NaN or infinite; the gradients are as they were, so that it is seen which are at fault.
    """
    parameters = list(parameters)
    total = get_total_norm([one.grad for one in parameters if one.grad is not None])
    of_shards = getattr(total, "full_tensor", None)  # a DTensor's; to import the class takes most of a second
    norm = float(total if of_shards is None else of_shards())
    check_norm(step, norm, what)
    clip_grads_with_norm_(parameters, most, total)
    return norm


def apply_update(
    norm: float, optimizer: Optimizer, scheduler: LRScheduler, reduced: ReduceStats, *, of_updates: bool
) -> UpdateStats:
    """Update the parameters, and advance the schedule.

    Args:
        norm: of what was averaged, before clipping; finite.
        optimizer: whose parameters have averaged gradients.
        scheduler: of its learning rate.
        reduced: what the exchange has cost.
        of_updates: whether updates were averaged, not gradients.
    """
    lr = float(scheduler.get_last_lr()[0])
    optimizer.step()
    scheduler.step()
    if of_updates:
        return UpdateStats(lr=lr, update_norm=norm, reduced=reduced)
    return UpdateStats(lr=lr, grad_norm=norm, reduced=reduced)


def check_optimizer_names(saved: Collection[str], running: Collection[str]) -> None:
    """Raise unless all parameters that have saved optimizer state are in the model.

    Raises:
        StateMismatch: names those that are not.
    """
    unknown = sorted(set(saved) - set(running))
    if unknown:
        raise StateMismatch(
            f"the checkpoint has optimizer state for parameters that the model lacks: {', '.join(unknown)}"
        )
