"""What a session's start and its steps leave in the run's events."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from outlast.comm import ReduceStats
from outlast.events import Logged, StepDone
from outlast.launch import Place
from outlast.session.compression import cost_of_step
from outlast.session.place import RunPlace
from outlast.session.state import SessionState


class StepRecord:
    """Times the steps of one rank, and writes an event for each.

    Args:
        run: where events are written.
        state: of the models, their optimizers and reducers.
    """

    def __init__(self, run: RunPlace, state: SessionState) -> None:
        self._run = run
        self._state = state
        self._logged: dict[str, float | Tensor] = {}
        self._boundary_s = 0.0
        self._seen_s: float | None = 0.0
        self._cost: ReduceStats | None = None

    def tell_start(self, device: torch.device, place: Place, done_step: int, last_step: int) -> None:
        """Write the event of the start; rank 0 also says in a line where it begins, and how gradients are averaged."""
        reducers = self._state.reducers
        comm = "; ".join(one.config.describe() for one in reducers.values()) if reducers else "dense"
        self._run.tell_start(
            device=str(device),
            first_step=done_step + 1,
            last_step=last_step,
            parameters=sum(one.parameters() for one in self._state.trained),
            comm=comm,
        )
        if place.rank == 0:
            start = f"goes on after step {done_step}" if done_step else "begins"
            ranks = f"{place.world_size} rank{'s' if place.world_size > 1 else ''} ({place.source})"
            print(f"outlast: {self._run.path}: {start}; {ranks}; gradients: {comm}", file=sys.stderr, flush=True)

    def begin_steps(self) -> None:
        """The first step begins as soon as the loop wants."""
        self._boundary_s = time.perf_counter()
        self._run.watch.delays.forget()

    def begin_step(self, step: int) -> None:
        """A step begins; reducers learn the scale of its loss."""
        self._logged = {}
        scaler = self._state.scaler
        if scaler is not None:
            for reducer in self._state.reducers.values():
                reducer.begin_step(step, loss_scale=float(scaler.get_scale()))

    def log(self, values: Mapping[str, float | Tensor]) -> None:
        """Numbers of this step; tensors are read at its end."""
        self._logged.update({name: v.detach() if isinstance(v, Tensor) else v for name, v in values.items()})

    @property
    def logged(self) -> Mapping[str, float | Tensor]:
        """What the program has logged in this step."""
        return self._logged

    def end_update(self, step: int) -> float:
        """The step's update is made, and saving may begin; returns the time, for :meth:`end_step`.

        Raises:
            CommError: an exchange failed.
        """
        self._cost = cost_of_step(self._state.reducers)
        self._seen_s = self._run.watch.end_step(step)
        return time.perf_counter()

    def end_step(self, step: int, saving_began_s: float) -> StepDone:
        """Write the step's events; returns the one that says what it took."""
        now = time.perf_counter()
        cost = self._cost
        assert cost is not None
        step_s = now - self._boundary_s
        spent = self._run.watch.delays.end_step(step, step_s)
        values = {name: float(value) for name, value in self._logged.items()}
        done = StepDone(
            step=step,
            loss=values.pop("loss", None),
            lr=next((one.lr for one in self._state.trained if one.lr is not None), 0.0),
            tokens=int(values.pop("tokens", 0)),
            step_s=step_s,
            data_s=min(spent.data_s, step_s),
            comm_s=cost.exposed_s,
            checkpoint_s=now - saving_began_s,
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
