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
from outlast.comm.transport.stream import DeviceStream
from outlast.comm.transport.worker import OrderedWorker


class OverflowVote:
    """Checks gradients as they come. Once all are there, the ranks vote on whether to use them.

    Args:
        codec: the thread that checks.
        communicator: all ranks.
        pipeline: of the buckets' collectives.
        meter: notes steps that are skipped.
        stream: where the gradients are checked.
    """

    def __init__(
        self,
        codec: OrderedWorker,
        communicator: Communicator,
        pipeline: Pipeline,
        meter: ReduceMeter,
        stream: DeviceStream,
    ) -> None:
        self._codec = codec
        self._communicator = communicator
        self._pipeline = pipeline
        self._meter = meter
        self._stream = stream
        self._all_finite = True

    def check(self, bucket: BucketExchange) -> None:
        """Check one bucket's gradients. Returns at once."""
        self._codec.submit(partial(self._check, bucket)).add_done_callback(bucket.fail)

    def decide(self, buckets: Sequence[BucketExchange]) -> None:
        """All gradients have been checked: use all buckets, or skip them all if some rank's gradients overflowed.

        A collective call; returns at once. Failure: every bucket's ``done`` gets the error.
        """
        self._codec.submit(partial(self._send, buckets)).add_done_callback(partial(_fail, buckets))

    def _check(self, bucket: BucketExchange) -> None:
        with torch.no_grad(), self._stream.work(bucket.is_ready):
            self._all_finite = self._all_finite and all(finite(grad) for grad in bucket.grads)

    def _send(self, buckets: Sequence[BucketExchange]) -> None:
        """In the codec's thread, behind the last bucket's check."""
        with self._stream.work():
            vote = torch.full((8,), not self._all_finite, dtype=torch.uint8, device=self._stream.device)
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
        with self._stream.work():
            for bucket in buckets:
                bucket.skip()


def _fail(buckets: Sequence[BucketExchange], source: Future[Any]) -> None:
    for bucket in buckets:
        bucket.fail(source)
