"""In which point-to-point operation this process waits, where torch's flight recorder does not say: on the CPU.

``send`` and ``recv``, ``isend`` and ``irecv``, ``batch_isend_irecv`` and what is built of them call two methods of a
process group, and wait for what these return. Both are noted; nothing else is changed. It costs about 2 µs an
operation, and less than 1 µs each time that a program waits for a collective by itself.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from outlast.diagnostics.live.flight import POINT_TO_POINT
from outlast.diagnostics.live.patches import hide_from_compile

MODULE = "torch.distributed.distributed_c10d"
"""After it is imported, :func:`install` takes it."""


@dataclass(frozen=True, slots=True)
class Operation:
    """A point-to-point operation. Times are CLOCK_MONOTONIC nanoseconds."""

    number: int
    """How many this process issued before."""
    op: str
    """``send to 1``, ``recv from 0``, with ranks in the group."""
    group: str
    nbytes: int
    """Of the first tensor."""
    began_ns: int
    """When the wait for it began."""


_numbers = itertools.count()
_issued: WeakKeyDictionary[Any, tuple[int, str, Any, str, int]] = WeakKeyDictionary()  # number, op, peer, group, bytes
_waits: dict[int, tuple[tuple[int, str, Any, str, int], int]] = {}  # by thread: the operation, and since when


def waiting() -> tuple[Operation, ...]:
    """The operations that threads of this process wait for now, oldest first."""
    found = [
        Operation(number, words.format(peer), f"{POINT_TO_POINT}{group}", nbytes, began_ns)
        for (number, words, peer, group, nbytes), began_ns in list(_waits.values())
    ]
    return tuple(sorted(found, key=lambda one: one.number))


def issued() -> int:
    """How many operations were issued so far."""
    return int(_numbers.__reduce__()[1][0])


def install(module: ModuleType) -> None:
    """Note the operations of all process groups of the module, which is :data:`MODULE`."""
    group, work = module.ProcessGroup, module.Work
    for name, words in (("send", "send to {}"), ("recv", "recv from {}"), ("recv_anysource", "recv from any rank")):
        setattr(group, name, _noted(getattr(group, name), words))
    work.wait = _timed(work.wait)
    hide_from_compile(group.send, group.recv, group.recv_anysource, work.wait)


def _noted(method: Callable[..., Any], words: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(group: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        work = method(group, tensors, *args, **kwargs)
        if work is not None and tensors[0].is_cpu:  # of others the flight recorder tells
            peer = args[0] if args else "?"
            _issued[work] = next(_numbers), words, peer, group.group_name, tensors[0].nbytes
        return work

    return call


def _timed(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        one = _issued.get(work)
        if one is None:
            return method(work, *args, **kwargs)
        thread = threading.get_ident()
        _waits[thread] = one, time.monotonic_ns()
        try:
            return method(work, *args, **kwargs)
        finally:
            del _waits[thread]

    return wait
