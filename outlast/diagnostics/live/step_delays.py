"""What kept this process from its work in a step: garbage collection, data, compilation; and how much work it had.

All three are told by those who know: Python's ``gc.callbacks``, the iterators of torch's DataLoader, and the callbacks
of torch's compiler. None of them is imported for this; they are taken when the program has imported them, and put back
by :meth:`StepDelays.close`.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import threading
import time
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar

from outlast.diagnostics.live.patches import AfterImport, hide_from_compile
from outlast.events import Event, EventLog

LEAST_S = 0.005
"""What takes less in a step is not told,"""
LEAST_SHARE = 0.02
"""nor what takes a smaller share of it."""
DATALOADER = "torch.utils.data.dataloader"
COMPILER = "torch._dynamo.callback"
MOST_ITEMS = 10_000
"""Tensors of one batch that are counted."""
DEEPEST = 6
"""Lists in lists, and so on, of a batch that are looked into."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankDelay(Event):
    """Something kept a rank from its work, for a part of a step that is worth telling."""

    kind: ClassVar[str] = "rank_delay"
    step: int
    what: str
    """``garbage_collection``, ``data_wait`` or ``compile``."""
    seconds: float
    """Of this step, all told."""
    count: int
    """How many collections or compilations that were; 1 for data."""
    generation_collected: int | None = None
    """The highest that was collected."""


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Of one step."""

    data_s: float
    """Seconds that the thread which ends steps, or else the main thread, spent in ``next()`` of DataLoaders, without
    collections in it."""
    batch_elements: int | None
    """Elements of the tensors that DataLoaders gave out; None if they gave none."""
    gc_s: float
    compile_s: float


class StepDelays:
    """Adds up, in one process, between :meth:`open` and :meth:`close`. A process forked from it counts nothing.

    A program that loads its data in a thread of its own waits for that thread, which nobody sees; how large its batches
    are is known all the same.

    Args:
        events: takes a :class:`RankDelay` for each delay of a step that exceeds the floor.
    """

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._pid = os.getpid()
        self._is_open = False
        self._collections = Collections()
        self._compilations = _Compilations()
        self._batches = _Batches(self._collections, self._pid)
        self._hooks = (
            AfterImport(DATALOADER, self._batches.patch),
            AfterImport(COMPILER, self._compilations.listen),
        )
        self._seen_gc = self._collections.totals()
        self._seen_compile: tuple[int, float] = (0, 0.0)

    def open(self) -> None:
        """Begin to count."""
        if self._is_open:
            return
        self._is_open = True
        gc.callbacks.append(self._collections.on_gc)
        for hook in self._hooks:
            hook.install()

    def close(self) -> None:
        """Put back what was changed; closing twice is harmless."""
        if not self._is_open:
            return
        self._is_open = False
        for hook in self._hooks:
            hook.remove()
        if self._collections.on_gc in gc.callbacks:
            gc.callbacks.remove(self._collections.on_gc)
        self._batches.restore()
        self._compilations.leave()

    def collected_s(self) -> float:
        """Seconds of all collections so far, one that is under way included."""
        return self._collections.so_far_s()

    def forget(self) -> None:
        """What was so far belongs to no step."""
        self._take()

    def end_step(self, step: int, step_s: float | None, *, data_s: float | None = None) -> StepTotals:
        """The step has ended, in this thread: write what delayed it, and begin with the next one.

        Args:
            step: its number.
            step_s: how long it took, seconds; None if that is not known.
            data_s: seconds that it waited for data, of a program that knows; None takes those in DataLoaders.
        """
        totals, pauses, generation, compiled = self._take()
        if data_s is not None:
            totals = replace(totals, data_s=data_s)
        floor_s = max(LEAST_S, LEAST_SHARE * (step_s or 0.0))
        if totals.gc_s >= floor_s:
            self._write(step, "garbage_collection", totals.gc_s, pauses, generation)
        if totals.compile_s >= floor_s:
            self._write(step, "compile", totals.compile_s, compiled)
        if totals.data_s >= floor_s:
            self._write(step, "data_wait", totals.data_s, 1)
        return totals

    def _write(self, step: int, what: str, seconds: float, count: int, generation: int | None = None) -> None:
        delay = RankDelay(step=step, what=what, seconds=round(seconds, 6), count=count, generation_collected=generation)
        self._events.write(delay)

    def _take(self) -> tuple[StepTotals, int, int, int]:
        """What is new since the last time: the sums, collections, the highest generation of them, and compilations."""
        self._compilations.stay()
        before, self._seen_gc = self._seen_gc, self._collections.totals()
        counts = [now - then for now, then in zip(self._seen_gc[1], before[1], strict=True)]
        compiled, compile_s = self._compilations.count, self._compilations.seconds
        seen, self._seen_compile = self._seen_compile, (compiled, compile_s)
        data_s, elements = self._batches.take()
        totals = StepTotals(data_s, elements, self._seen_gc[0] - before[0], compile_s - seen[1])
        generation = max((one for one, count in enumerate(counts) if count), default=0)
        return totals, sum(counts), generation, compiled - seen[0]


class Collections:
    """Pauses to collect older objects since this was made, in whichever thread: no other one runs meanwhile.

    Nothing in it may wait for a lock: a collection may begin inside any allocation, also of a thread that holds one.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._counts = [0, 0, 0]
        self._began_s: float | None = None

    def totals(self) -> tuple[float, tuple[int, ...]]:
        """Seconds, and how many collections there were of each generation."""
        return self.seconds, tuple(self._counts)

    def so_far_s(self) -> float:
        """Seconds, with those of a collection that has not ended, or of which this was not told yet."""
        began_s = self._began_s
        return self.seconds + (time.perf_counter() - began_s if began_s is not None else 0.0)

    def on_gc(self, phase: str, info: Mapping[str, int]) -> None:
        """For ``gc.callbacks``: a collection begins or has ended; there is one at a time.

        Those of the youngest generation look at some hundred objects, which takes no longer than to note it.
        """
        if info["generation"] == 0:
            return
        if phase == "start":
            self._began_s = time.perf_counter()
        elif self._began_s is not None:
            self.seconds += time.perf_counter() - self._began_s
            self._counts[min(info["generation"], 2)] += 1
            self._began_s = None


class _Compilations:
    """Seconds in which torch's compiler was at work, on whichever frames."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        self._handler: Any = None
        self._began_s: float | None = None

    def listen(self, module: ModuleType) -> None:
        self._handler = module.callback_handler
        self.stay()

    def stay(self) -> None:
        """Be called again, if the compiler was reset meanwhile, which forgets who is to be called."""
        if self._handler is not None and self._begin not in self._handler.start_callbacks:
            self._handler.register_start_callback(self._begin)
            self._handler.register_end_callback(self._end)

    def leave(self) -> None:
        handler, self._handler = self._handler, None
        if handler is not None and self._begin in handler.start_callbacks:
            handler.remove_start_callback(self._begin)
            handler.remove_end_callback(self._end)

    def _begin(self, *_: object) -> None:  # earlier versions give no argument
        self._began_s = time.perf_counter()

    def _end(self, *_: object) -> None:
        if self._began_s is not None:
            self.seconds += time.perf_counter() - self._began_s
            self.count += 1
            self._began_s = None


class _Batches:
    """Time in ``next()`` of DataLoaders, by thread, and the elements of what they gave out."""

    def __init__(self, collections: Collections, pid: int) -> None:
        self._collections = collections
        self._pid = pid
        self._lock = threading.Lock()
        self._seconds: dict[int, float] = {}
        self._elements = 0
        self._came = False
        self._inside = threading.local()  # a dataset may read from a loader of its own
        self._class: Any = None
        self._method: Any = None
        self._patched: Any = None

    def take(self) -> tuple[float, int | None]:
        """Seconds of this thread, and elements for all, since the last time."""
        with self._lock:
            # an optimizer may be stepped by a thread of backward's; what loads ahead is seldom the main thread
            waited = (
                self._seconds.get(one, 0.0) for one in (threading.get_ident(), threading.main_thread().ident or 0)
            )
            data_s = next((one for one in waited if one), 0.0)
            self._seconds.clear()
            elements = self._elements if self._came else None
            self._elements, self._came = 0, False
        return data_s, elements

    def patch(self, module: ModuleType) -> None:
        self._class = module._BaseDataLoaderIter
        self._method = method = self._class.__next__
        torch = sys.modules["torch"]

        @functools.wraps(method)
        def timed(iterator: Any) -> Any:
            if self._patched is None or getattr(self._inside, "yes", False) or os.getpid() != self._pid:
                return method(iterator)
            self._inside.yes = True
            began_s, collected_s = time.perf_counter(), self._collections.seconds
            try:
                batch = method(iterator)
            finally:
                self._inside.yes = False
                took_s = time.perf_counter() - began_s - (self._collections.seconds - collected_s)
                self._add(max(took_s, 0.0), None)
            if torch.is_grad_enabled():  # what is evaluated is no work of the step
                self._add(0.0, elements_of(batch, torch.Tensor))
            return batch

        self._patched = timed
        self._class.__next__ = timed
        hide_from_compile(timed)

    def restore(self) -> None:
        """The method as it was; where somebody has wrapped it since, it stays, and does nothing."""
        if self._patched is not None and self._class.__next__ is self._patched:
            self._class.__next__ = self._method
        self._patched = None

    def _add(self, seconds: float, elements: int | None) -> None:
        thread = threading.get_ident()
        with self._lock:
            self._seconds[thread] = self._seconds.get(thread, 0.0) + seconds
            if elements is not None:
                self._elements += elements
                self._came = True


def elements_of(batch: Any, tensor: type[Any]) -> int:
    """Elements of a batch: of tensors, and of dictionaries, lists and tuples of them; 0 for what else there is.

    Args:
        batch: what a loader gave out.
        tensor: torch's class of tensors.
    """
    total, left = 0, MOST_ITEMS
    inner: list[tuple[Any, int]] = [(batch, 0)]
    while inner and left:
        one, depth = inner.pop()
        left -= 1
        if isinstance(one, tensor):
            total += int(one.numel())
        elif depth < DEEPEST and isinstance(one, (dict, UserDict)):
            inner.extend((each, depth + 1) for each in one.values())
        elif depth < DEEPEST and isinstance(one, (list, tuple)):
            inner.extend((each, depth + 1) for each in one[:MOST_ITEMS])
    return total
