"""What a session's start and its steps leave in the run's events."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

from outlast.comm import ReduceStats
from outlast.events import Logged, StepDone
from outlast.session.place import RunPlace
from outlast.session.trainable import Trainable


class StepRecord:
    """Times the steps of one rank, and writes an event for each.

    Args:
        run: where events are written.
        state: what is trained.
    """

    def __init__(self, run: RunPlace, state: Trainable) -> None:
        self._run = run
        self._state = state
        self._logged: dict[str, float | Tensor] = {}
        self._boundary_s = 0.0
        self._spent_s: defaultdict[str, float] = defaultdict(float)
        self._seen_s: float | None = 0.0
        self._cost: ReduceStats | None = None

    def tell_start(self, done_step: int, last_step: int) -> None:
        """Write the event of the start; rank 0 also says in a line where it begins, and how gradients are averaged."""
        run, state = self._run, self._state
        run.tell_start(
            device=str(state.device),
            first_step=done_step + 1,
            last_step=last_step,
            parameters=state.parameters(),
            comm=state.comm,
        )
        if not run.loop_tells:
            start = f"goes on after step {done_step}" if done_step else "begins"
            ranks = f"{run.place.world_size} rank{'s' if run.place.world_size > 1 else ''} ({run.place.source})"
            run.say(f"{run.path}: {start}; {ranks}; gradients: {state.comm}")

    def begin_steps(self) -> None:
        """The next step begins as soon as the loop wants."""
        self._boundary_s = time.perf_counter()
        self._run.watch.delays.forget()

    def begin_step(self) -> None:
        """A step begins."""
        self._logged = {}
        self._spent_s.clear()

    @contextmanager
    def spent(self, on: Literal["data", "checkpoint"]) -> Iterator[None]:
        """A phase of the step."""
        watch = self._run.watch
        began_s = time.perf_counter()
        watch.begin_phase(on)
        try:
            yield
        finally:
            watch.go_on()
            self._spent_s[on] += time.perf_counter() - began_s

    def log(self, values: Mapping[str, float | Tensor]) -> None:
        """Numbers of this step; tensors are read at its end."""
        self._logged.update({name: v.detach() if isinstance(v, Tensor) else v for name, v in values.items()})

    @property
    def logged(self) -> Mapping[str, float | Tensor]:
        """What the program has logged in this step."""
        return self._logged

    def end_update(self, step: int) -> None:
        """The step's update is made, and saving may begin.

        Raises:
            SessionError, CommError: see :meth:`Trainable.end_step`.
        """
        self._cost = self._state.end_step(step)
        self._seen_s = self._run.watch.end_step(step)

    def end_step(self, step: int) -> StepDone:
        """Write the step's events; returns the one that says what it took."""
        now = time.perf_counter()
        cost = self._cost
        assert cost is not None
        step_s = now - self._boundary_s
        spent = self._run.watch.delays.end_step(step, step_s, data_s=self._spent_s.get("data"))
        values = {name: float(value) for name, value in self._logged.items()}
        done = StepDone(
            step=step,
            loss=values.pop("loss", None),
            grad_norm=values.pop("grad_norm", None),
            update_norm=values.pop("update_norm", None),
            lr=self._state.lr,
            tokens=int(values.pop("tokens", 0)),
            step_s=step_s,
            data_s=min(spent.data_s, step_s),
            comm_s=cost.exposed_s,
            checkpoint_s=self._spent_s["checkpoint"],
            collective_s=None if self._seen_s is None else min(max(self._seen_s, cost.collective_s), step_s),
            codec_s=cost.codec_s,
            wire_bytes=cost.wire_bytes,
            dense_bytes=cost.dense_bytes,
            alpha=cost.alpha,
            residual=cost.residual,
            batch_elements=spent.batch_elements,
        )
        self._boundary_s = now
        self._run.events.write(done)
        if values:
            self._run.events.write(Logged(step=step, values=values))
        return done
