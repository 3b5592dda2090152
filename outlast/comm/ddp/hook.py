"""DDP's communication hook.

Without postponed annotations, because DDP compares a hook's annotations with the types themselves.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist


class Bucket(Protocol):
    """The part of ``torch.distributed.GradBucket`` that is used; it has no stubs."""

    def index(self) -> int: ...

    def is_last(self) -> bool: ...

    def buffer(self) -> torch.Tensor: ...

    def gradients(self) -> list[torch.Tensor]: ...

    def parameters(self) -> list[torch.Tensor]: ...


class BucketSink(Protocol):
    """Receives the hook's buckets."""

    def on_bucket(self, bucket: Bucket) -> torch.futures.Future[torch.Tensor]:
        """Called by DDP during backward, for the buckets in the same order on every rank."""
        ...


def hook(state: BucketSink, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """Register it with ``ddp.register_comm_hook(state, hook)``."""
    return state.on_bucket(bucket)


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run ``callback`` in the thread that called ``backward()``, once the backward pass is complete.

    Call it from a hook. Callbacks run in the order they were queued, and DDP queues its own after the last bucket's
    hook, so an error raised here reaches the caller of ``backward()`` as it is; DDP would turn it into a cast error.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)
