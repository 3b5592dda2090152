"""One bucket of gradients, from ready to averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from outlast.comm.exchange.item import Presence, Stage
from outlast.comm.exchange.method import ExchangeMethod
from outlast.comm.exchange.pipeline import Pipeline
from outlast.comm.exchange.stats import ReduceMeter
from outlast.comm.state.parameters import ParamState


class BucketExchange:
    """A bucket on its way: :meth:`use` sends it off, :meth:`skip` gives it up, :meth:`fail` ends it with an error.

    Its gradients must not be touched before :attr:`done`.

    Args:
        label: what it is, the same on every rank.
        states: of its parameters.
        grads: their gradients, overwritten with the estimates.
        method: what is done with them.
        pipeline: the order of collectives.
        meter: of the step.
        step: the step it belongs to.
        loss_scale: the factor in the gradients; 1 where there is no scaler.
        ready: the event after which the gradients are ready; None where there are no streams.
        presence: which of them take part; None where all do.
        on_written: called by the codec's thread once the estimates are written.
    """

    def __init__(
        self,
        label: str,
        states: list[ParamState],
        grads: list[Tensor],
        *,
        method: ExchangeMethod,
        pipeline: Pipeline,
        meter: ReduceMeter,
        step: int,
        loss_scale: float,
        ready: torch.cuda.Event | None,
        presence: Sequence[Presence] | None,
        on_written: Callable[[], None],
    ) -> None:
        self.grads = grads
        self.done: Future[None] = Future()
        """Completed once the estimates are written, or with the error that kept them from it."""
        self.label = label
        self._states = states
        self._method = method
        self._pipeline = pipeline
        self._meter = meter
        self._step = step
        self._loss_scale = loss_scale
        self.is_ready = ready
        """The event after which the gradients are ready; None where there are no streams."""
        self._presence = presence
        self._on_written = on_written
        meter.ready(sum(grad.numel() for grad in grads))

    def use(self) -> None:
        """Compress and exchange the gradients, in the pipeline's two threads. Returns at once."""
        *others, last = self._method.stages(
            self.label, self._states, self.grads, self._step, self._loss_scale, self._meter.probe, self._presence
        )
        stages = [*others, Stage("codec", partial(self._write, last))]
        running = self._pipeline.start([self._timed(stage) for stage in stages])
        running.done.add_done_callback(self._complete)

    def skip(self) -> None:
        """Leave Inf in the gradients, where every scaler finds it, and the state as it was."""
        with torch.no_grad():
            for grad in self.grads:
                grad.view(-1)[:1].fill_(torch.inf)
        self._on_written()
        self.done.set_result(None)

    def fail(self, source: Future[Any]) -> None:
        """End with the error of a finished job, if it has one: a callback for its future."""
        pass_error(source, self.done)

    def _write(self, last: Stage) -> None:
        last.work()
        self._on_written()
        self._meter.done()

    def _complete(self, source: Future[None]) -> None:
        self.fail(source)
        if not self.done.done():
            self.done.set_result(None)

    def _timed(self, stage: Stage) -> Stage:
        return stage if stage.thread == "wire" else Stage("codec", partial(self._in_codec, stage))

    def _in_codec(self, stage: Stage) -> None:
        with self._meter.codec(self.is_ready):
            stage.work()


class Fails(Protocol):
    """A future, of Python's or of torch's kind."""

    def done(self) -> bool: ...

    def set_exception(self, error: Any, /) -> None: ...


def pass_error(source: Future[Any], target: Fails) -> None:
    """The error of a finished future, if it has one, into another that still waits."""
    error = source.exception()
    if error is not None and not target.done():
        target.set_exception(error)
