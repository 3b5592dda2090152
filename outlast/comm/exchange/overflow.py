"""Gradients scaled for half precision: used on all ranks, or, when they overflowed on one, on none."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from torch import Tensor

from outlast.comm.compressors.base import finite
from outlast.comm.exchange.bucket import BucketExchange
from outlast.comm.exchange.pipeline import Pipeline
from outlast.comm.exchange.stats import ReduceMeter
from outlast.comm.transport.communicator import Communicator
from outlast.comm.transport.worker import OrderedWorker


class OverflowVote:
    """Checks gradients as they come. Once all are there, the ranks vote on whether to use them.

    Args:
        codec: the thread that checks.
        communicator: all ranks.
        pipeline: of the buckets' collectives.
        meter: notes steps that are skipped.
        device: of the gradients.
    """

    def __init__(
        self,
        codec: OrderedWorker,
        communicator: Communicator,
        pipeline: Pipeline,
        meter: ReduceMeter,
        device: torch.device,
    ) -> None:
        self._codec = codec
        self._communicator = communicator
        self._pipeline = pipeline
        self._meter = meter
        self._device = device
        self._all_finite = True

    def look(self, bucket: BucketExchange) -> None:
        """Take one bucket's gradients into account. Returns at once."""
        self._codec.submit(partial(self._look, bucket.grads)).add_done_callback(bucket.fail)

    def decide(self, buckets: Sequence[BucketExchange]) -> None:
        """All gradients have been looked at: use all buckets, or, where a rank's gradients overflowed, skip them all.

        A collective call; returns at once. Failure: every bucket's ``done`` gets the error.
        """
        vote = torch.zeros(8, dtype=torch.uint8, device=self._device)
        self._codec.submit(partial(self._send, vote, buckets)).add_done_callback(partial(_fail, buckets))

    def _look(self, grads: list[Tensor]) -> None:
        with torch.no_grad():
            self._all_finite = self._all_finite and all(finite(grad) for grad in grads)

    def _send(self, vote: Tensor, buckets: Sequence[BucketExchange]) -> None:
        """In the codec's thread, behind the last bucket's look."""
        vote.fill_(not self._all_finite)
        self._all_finite = True
        self._communicator.submit(partial(self._count, vote, buckets)).add_done_callback(partial(_fail, buckets))

    def _count(self, vote: Tensor, buckets: Sequence[BucketExchange]) -> None:
        """In the communicator's thread."""
        if bool(self._communicator.all_gather(vote, "overflow").any()):
            self._codec.submit(partial(self._skip, buckets)).add_done_callback(partial(_fail, buckets))
            return
        for bucket in buckets:
            bucket.use()
        self._pipeline.flush()

    def _skip(self, buckets: Sequence[BucketExchange]) -> None:
        self._meter.skipped = True
        for bucket in buckets:
            bucket.skip()


def _fail(buckets: Sequence[BucketExchange], source: Future[Any]) -> None:
    for bucket in buckets:
        bucket.fail(source)
