"""DDP's communication hook.

Without postponed annotations, because DDP compares a hook's annotations with the types themselves.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from outlast.comm.transport.stream import DeviceStream
from outlast.errors import CommError


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


class HookSlot:
    """What DDP holds as its hook's state. DDP takes a hook once and for all; who sits in the slot may change.

    Args:
        group: over whose ranks DDP averages while the slot is empty.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.sink: BucketSink | None = None


_slots: weakref.WeakKeyDictionary[DistributedDataParallel, HookSlot] = weakref.WeakKeyDictionary()


def take_slot(ddp: DistributedDataParallel, sink: BucketSink) -> HookSlot:
    """Have ``ddp`` hand its buckets to ``sink`` from the next backward on, until the slot is emptied.

    Raises:
        CommError: it has a communication hook already.
    """
    slot = _slots.get(ddp)
    if slot is None:
        slot = HookSlot(ddp.process_group)
        try:
            ddp.register_comm_hook(slot, hook)
        except RuntimeError as error:
            raise CommError(
                f"the model has a communication hook already: {error}", "leave out register_comm_hook()"
            ) from error
        _slots[ddp] = slot
    elif slot.sink is not None:
        raise CommError("the model's gradients are averaged by another reducer", "close() that one first")
    slot.sink = sink
    return slot


def hook(state: HookSlot, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """DDP calls it with each bucket. With nobody in the slot it averages as DDP does without a hook."""
    if state.sink is None:
        return allreduce_hook(state.group, bucket)
    return state.sink.on_bucket(bucket)


class BucketFuture:
    """The future that DDP waits for, without a limit: so it is completed whatever happens, once, by whoever is first.

    Args:
        buffer: of the bucket; the future's value.
        stream: where it is written.
    """

    def __init__(self, buffer: torch.Tensor, stream: DeviceStream) -> None:
        self.future = stream.future()
        self._buffer = buffer
        self._lock = threading.Lock()
        self._done = False

    def complete(self) -> None:
        """The buffer holds what DDP is to take, or an error follows that makes it meaningless."""
        with self._lock:
            if not self._done:
                self._done = True
                self.future.set_result(self._buffer)


def in_backward() -> bool:
    """Whether the calling thread is inside a backward pass; under ``ddp.join()`` a hook is called outside of one."""
    return torch._C._current_graph_task_id() != -1


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run ``callback`` in the thread that called ``backward()``, once the backward pass is complete.

    Call it from a hook, or from such a callback. Callbacks run in the order they were queued, and DDP queues its own
    after the last bucket's hook. An error raised here reaches the caller of ``backward()`` as it is; DDP would turn
    one from a hook into a cast error, and be left in the middle of its pass.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)
