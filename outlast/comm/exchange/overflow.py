"""Gradients scaled for half precision: used on all ranks, or, when they overflowed on one, on none."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch import Tensor

from outlast.comm.compressors.base import finite
from outlast.comm.transport.communicator import Communicator
from outlast.comm.transport.stream import DeviceStream
from outlast.comm.transport.worker import OrderedWorker


class OverflowVote:
    """Looks at gradients as they come, and once all are there agrees on them with the other ranks.

    Args:
        codec: the thread that looks.
        communicator: all ranks.
        lane: where the gradients are looked at.
    """

    def __init__(self, codec: OrderedWorker, communicator: Communicator, lane: DeviceStream) -> None:
        self._codec = codec
        self._communicator = communicator
        self._lane = lane
        self._all_finite = True

    def look(self, grads: list[Tensor], ready: torch.cuda.Event | None) -> Future[None]:
        """Take one bucket's gradients into account, once they are ``ready``."""

        def job() -> None:
            with torch.no_grad(), self._lane.work(ready):
                self._all_finite = self._all_finite and all(finite(grad) for grad in grads)

        return self._codec.submit(job)

    def decide(self, use: Callable[[], None], skip: Callable[[], None], failed: Callable[[Future[None]], None]) -> None:
        """All gradients have been looked at: on every rank alike, call ``use`` or ``skip``. A collective call.

        Args:
            use: called in the communicator's thread where no rank's gradients overflowed.
            skip: called in the codec's thread, in the lane, otherwise.
            failed: told of each job's future, as a callback.
        """

        def say() -> None:
            with self._lane.work():
                vote = torch.full((8,), not self._all_finite, dtype=torch.uint8, device=self._lane.device)
            self._all_finite = True
            self._communicator.submit(lambda: hear(vote)).add_done_callback(failed)

        def hear(vote: Tensor) -> None:
            if bool(self._communicator.all_gather(vote, "overflow").any()):
                self._codec.submit(skip_in_lane).add_done_callback(failed)
            else:
                use()

        def skip_in_lane() -> None:
            with self._lane.work():
                skip()

        self._codec.submit(say).add_done_callback(failed)


def make_infinite(grads: list[Tensor]) -> None:
    """Inf where every scaler finds it."""
    with torch.no_grad():
        for grad in grads:
            grad.view(-1)[:1].fill_(torch.inf)
