"""The backward passes of a DDP model: their buckets, and how they end."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from outlast.comm.ddp.averager import BucketAverager
from outlast.comm.ddp.checks import check_bucket, refuse_ddp, refuse_sparse
from outlast.comm.ddp.hook import Bucket, BucketFuture, at_end_of_backward, in_backward, take_slot
from outlast.comm.ddp.used import UsedParameters
from outlast.comm.transport.stream import DeviceStream
from outlast.errors import CommError


class DdpBackward:
    """Takes the buckets of a DDP model's backward passes to an averager.

    DDP must never be left in the middle of a pass, or it fails for good with an assertion of its own. So every bucket's
    future is completed, with or without an average, and what went wrong is raised when DDP has ended the pass.

    The pass ends with its last bucket, not with the call of ``backward()`` in which its first one came: under reentrant
    activation checkpointing each checkpoint runs a backward of its own, inside the outer one.

    Args:
        ddp: the model.
        averager: of its gradients.
        stream: where estimates are written.

    Raises:
        CommError: a setting of DDP, or a gradient of the model, that cannot be averaged.
    """

    def __init__(self, ddp: DistributedDataParallel, averager: BucketAverager, stream: DeviceStream) -> None:
        refuse_ddp(ddp)
        refuse_sparse(ddp.module)
        self._ddp = ddp
        self._averager = averager
        self._stream = stream
        self._futures: list[BucketFuture] = []
        self._error: Exception | None = None
        watches = ddp.find_unused_parameters or ddp.static_graph
        self._slot = take_slot(ddp, self)
        self._used = UsedParameters(ddp.module.parameters()) if watches else None

    def on_bucket(self, bucket: Bucket) -> torch.futures.Future[Tensor]:
        """DDP's hook: queue a bucket and return at once; the future completes with the bucket's buffer, averaged."""
        if bucket.index() == 0:
            self._error = None  # of a pass that ended before its last bucket
            self._futures = []
        result = BucketFuture(bucket.buffer(), self._stream)
        self._futures.append(result)
        if self._error is None:
            try:
                self._average(bucket, result)
            except Exception as error:
                self._error = error
        if self._error is not None:
            result.complete()
        if bucket.is_last():
            self._last()
        return result.future

    def detach(self) -> None:
        """Let DDP average by itself."""
        self._slot.sink = None
        if self._used is not None:
            self._used.close()

    def _average(self, bucket: Bucket, result: BucketFuture) -> None:
        self._refuse_join()
        params, index = bucket.parameters(), bucket.index()
        check_bucket(bucket, [self._averager.name_of(param) for param in params])
        used = None if self._used is None else self._used.take(params)
        self._averager.begin_bucket(index, params, used, not in_backward())
        self._averager.start_bucket(index, params, bucket.gradients(), used, result.complete)

    def _last(self) -> None:
        if self._error is None:
            self._averager.end_backward()
        if in_backward():
            at_end_of_backward(self._before_ddp_ends)
            return
        # A rank that has run out of inputs, under ddp.join(): it contributes zeros.
        self._settle()
        self._raise()

    def _before_ddp_ends(self) -> None:
        self._settle()
        if self._error is not None:
            at_end_of_backward(self._raise)

    def _settle(self) -> None:
        try:
            if self._error is not None:
                self._averager.give_up(self._error)
            else:
                self._averager.settle()
        except Exception as error:
            self._error = error
        futures, self._futures = self._futures, []
        for future in futures:
            future.complete()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _refuse_join(self) -> None:
        """DDP leaves it to the hook to divide by the number of ranks that still have inputs, and error feedback counts
        on all of them."""
        ddp = self._ddp
        joining = getattr(getattr(ddp, "_join_config", None), "enable", False)
        if joining and not getattr(ddp, "_divide_by_initial_world_size", True):
            raise CommError(
                "ddp.join(divide_by_initial_world_size=False) cannot be followed: error feedback averages over all "
                "ranks, and those without inputs count as zero",
                "leave out divide_by_initial_world_size",
            )
