"""The one-liner for people with their own loop."""

from __future__ import annotations

from typing import Any

from torch.nn.parallel import DistributedDataParallel

from outlast.comm.config import CommConfig
from outlast.comm.ddp.reducer import GradientReducer
from outlast.comm.direction import Direction
from outlast.comm.transport.communicator import CollectiveObserver


def attach(
    ddp: DistributedDataParallel,
    *,
    target: str,
    observer: CollectiveObserver | None = None,
    direction: Direction | None = None,
    **settings: Any,
) -> GradientReducer:
    """Compress what ``ddp`` averages, from the next backward on; a collective call.

    Adam's directions, with Adam in the reducer::

        reducer = attach(ddp, target="update", density=0.01)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3, weight_decay=0.1)

    Gradients, with any optimizer::

        reducer = attach(ddp, target="gradient", feedback="ef21", density=0.05)

    Args:
        ddp: the model; the ranks are those of its process group.
        target: ``update``, and the optimizer is SGD, or ``gradient``; see :class:`CommConfig`.
        observer: told of every collective.
        direction: of ``target = "update"``; None takes Adam with beta1 = 0, beta2 = 0.95.
        settings: other fields of :class:`CommConfig`.

    Returns:
        The reducer: save its ``state_dict()`` with every checkpoint of every rank.

    Raises:
        UnknownCompressor, OutOfRange: a setting is wrong.
        TypeError: there is no such setting.
    """
    config = CommConfig(target=target, **settings)
    reducer = GradientReducer(
        ddp.module.named_parameters(), config, group=ddp.process_group, observer=observer, direction=direction
    )
    reducer.attach(ddp)
    return reducer
