"""What torchrun finds under the name ``outlast``: entry point group ``torchrun.handlers``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters


def get_handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """The function that makes a handler from torchrun's flags."""
    return _handler


def _handler(params: RendezvousParameters) -> RendezvousHandler:
    """A handler for ``torchrun --rdzv-backend outlast``; see :func:`outlast.launch.control.connect.control_handler`."""
    from outlast.launch.control.connect import control_handler

    return control_handler(
        params.endpoint,
        params.run_id,
        least=params.min_nodes,
        most=params.max_nodes,
        conf=params.config,
        local_addr=params.local_addr,
        ends_spares=True,
    )
