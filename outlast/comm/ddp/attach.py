"""Compression under DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable

from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from outlast.comm.auto.policy import Choice
from outlast.comm.config import CommConfig
from outlast.comm.ddp.reducer import GradientReducer
from outlast.comm.direction import Direction
from outlast.comm.transport.communicator import CollectiveObserver


def attach_ddp(
    ddp: DistributedDataParallel,
    config: CommConfig | None = None,
    *,
    observer: CollectiveObserver | None = None,
    direction: Direction | None = None,
    dense_direction: Direction | None = None,
    on_choice: Callable[[Choice], None] | None = None,
    optimizer: Optimizer | None = None,
) -> GradientReducer:
    """Compress what ``ddp`` averages, from the next backward on; a collective call.

    Args:
        ddp: the model, before its first backward; the ranks are those of its process group.
        config: see :class:`CommConfig`; None takes its defaults. With ``target = "update"`` the optimizer is the
            one that is handed over, or else ``torch.optim.SGD``.
        observer: see :class:`GradientReducer`.
        direction: see :class:`GradientReducer`.
        dense_direction: see :class:`GradientReducer`.
        on_choice: see :class:`GradientReducer`.
        optimizer: see :class:`GradientReducer`.

    Raises:
        CommError: no default process group; parameters on several devices; a world size that is not a multiple of
            ``config.ranks_per_node``; an optimizer that cannot be kept.
    """
    reducer = GradientReducer(
        ddp.module.named_parameters(),
        config or CommConfig(),
        group=ddp.process_group,
        observer=observer,
        direction=direction,
        dense_direction=dense_direction,
        on_choice=on_choice,
        optimizer=optimizer,
    )
    reducer.attach(ddp)
    return reducer
