"""The newest steps of this node's ranks, from the events that they write."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from outlast.diagnostics.export.follow import NodeEvents
from outlast.diagnostics.live.step_delays import RankDelay
from outlast.diagnostics.syndromes.facts import FactKind
from outlast.diagnostics.syndromes.step_trace import DELAYS, MOST_STEPS, RankSteps
from outlast.events import ProgramStep, Record, StepDone

_NOTHING = (0.0,) * len(DELAYS)
LEAST_SAVING_S = 0.005
"""A step that a checkpoint held up for less is not told of."""
WARMUP_STEPS = 3
"""Steps of a start that are left out: they compile, allocate, connect."""

log = logging.getLogger("outlast.launch")


class StepWatch:
    """Follows the events of this node's ranks, in one start after another.

    It reads in a thread of its own: storage that hangs must not keep the launcher from its ranks.

    Args:
        run_dir: the run's directory.
        interval_s: between two looks.
    """

    def __init__(self, run_dir: Path, interval_s: float) -> None:
        self._run_dir = run_dir
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self.begin((), -1)

    def start(self) -> None:
        """Begin to look; starting twice is harmless."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="outlast-steps", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Look no more. Nothing waits for a look that goes on."""
        self._closing.set()

    def _run(self) -> None:
        told = ""
        while not self._closing.wait(self._interval_s):
            try:
                self.look()
            except OSError as error:  # storage that is away may come back
                if str(error) != told:
                    told = str(error)
                    log.warning("outlast: slow ranks are not told while their events cannot be read: %s", error)

    def begin(self, ranks: Sequence[int], generation: int) -> None:
        """``ranks`` start anew on this node."""
        with self._lock:
            self._events = NodeEvents(self._run_dir, None, since_t=time.time(), ranks=ranks)
            self._generation = generation
            self._steps: dict[int, deque[tuple[int, float, float, float]]] = {}
            self._skipped: dict[int, int] = {}
            self._delays: dict[tuple[int, int], list[float]] = {}

    def look(self) -> None:
        """Read what has been written since."""
        events = self._events
        told, _ = events.poll()
        with self._lock:
            if events is self._events:  # the ranks have not been started anew meanwhile
                self._take([record for _, record in told])

    def _take(self, told: Iterable[Record]) -> None:
        for record in told:
            get = record.fields.get
            step, inside_s, seconds = get("step"), get("collective_s"), get("seconds")
            if record.generation != self._generation or not isinstance(step, int):
                continue
            if record.kind in (StepDone.kind, ProgramStep.kind) and isinstance(inside_s, int | float):
                elements = next((float(one) for name in ("batch_elements", "tokens") if (one := get(name))), 0.0)
                self._add(record.rank, step, record.t, float(inside_s), elements)
                if isinstance(saving_s := get("checkpoint_s"), int | float) and saving_s >= LEAST_SAVING_S:
                    self._delay(record.rank, step, "checkpoint", float(saving_s))
            elif record.kind == RankDelay.kind and get("what") in DELAYS and isinstance(seconds, int | float):
                self._delay(record.rank, step, record["what"], float(seconds))
        self._forget()

    def _delay(self, rank: int, step: int, what: FactKind, seconds: float) -> None:
        delays_s = self._delays.setdefault((rank, step), [0.0] * len(DELAYS))
        delays_s[DELAYS.index(what)] += seconds

    def newest(self, now_t: float) -> tuple[RankSteps, ...]:
        """The newest steps of each rank, in seconds before ``now_t``, a time of day."""
        with self._lock:
            return tuple(
                RankSteps(
                    rank=rank,
                    steps=tuple(step for step, *_ in steps),
                    done_s=tuple(t - now_t for _, t, _, _ in steps),
                    inside_s=tuple(inside_s for _, _, inside_s, _ in steps),
                    delays_s=tuple(tuple(self._delays.get((rank, step), _NOTHING)) for step, *_ in steps),
                    elements=tuple(elements for *_, elements in steps),
                )
                for rank, steps in sorted(self._steps.items())
            )

    def _forget(self) -> None:
        """What is told of steps that are too old."""
        oldest = {rank: steps[0][0] for rank, steps in self._steps.items() if steps}
        for rank, step in [key for key in self._delays if key[1] < oldest.get(key[0], -1)]:
            del self._delays[rank, step]

    def _add(self, rank: int, step: int, t: float, inside_s: float, elements: float) -> None:
        if self._skipped.get(rank, 0) < WARMUP_STEPS:
            self._skipped[rank] = self._skipped.get(rank, 0) + 1
            return
        steps = self._steps.setdefault(rank, deque(maxlen=MOST_STEPS))
        if steps and step <= steps[-1][0]:
            steps.clear()  # a program that counts anew
        steps.append((step, t, inside_s, elements))
