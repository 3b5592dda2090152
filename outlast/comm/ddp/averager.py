"""Averages buckets of gradients: the two threads, the order of collectives, and what becomes of a failure."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from outlast.comm.exchange.bucket import BucketExchange
from outlast.comm.exchange.item import Presence
from outlast.comm.exchange.method import ExchangeMethod
from outlast.comm.exchange.optimizer_steps import OptimizerSteps, live_scaler
from outlast.comm.exchange.overflow import OverflowVote
from outlast.comm.exchange.pipeline import Pipeline
from outlast.comm.exchange.stats import ReduceMeter, ReduceStats
from outlast.comm.exchange.step_ledger import StepLedger
from outlast.comm.exchange.topology import Network
from outlast.comm.state.parameters import ParameterStates
from outlast.comm.transport.stream import DeviceStream
from outlast.comm.transport.worker import MARGIN_S, OrderedWorker
from outlast.errors import CommError, NonFiniteGradient

_ONCE = "call begin_step() before every step, and wrap all but its last backward in ddp.no_sync()"
_WRAP = (
    "wrap all but the last backward of a step in ddp.no_sync(), and also a backward that only passes through this "
    "model on its way to another, as a GAN's generator step does through the discriminator; where updates are skipped "
    "on purpose, call begin_step() before every step"
)
_SCALER = "call reducer.begin_step(step, loss_scale=scaler.get_scale()) before every backward"


class BucketAverager:
    """Averages the buckets of one backward pass after another.

    Args:
        network: over whom.
        method: how.
        states: of the parameters.
        stream: where the work on gradients runs.
        timeout_s: limit of each collective, in seconds.
        on_open: called with the number of a step that opens.
    """

    def __init__(
        self,
        network: Network,
        method: ExchangeMethod,
        states: ParameterStates,
        stream: DeviceStream,
        timeout_s: float,
        on_open: Callable[[int], None],
    ) -> None:
        self._network = network
        self._method = method
        self._states = states
        self._stream = stream
        self._timeout_s = timeout_s
        all_ranks = network.all_ranks
        self._codec = OrderedWorker("outlast-codec")
        self._pipeline = Pipeline(self._codec, all_ranks.submit, timeout_s + MARGIN_S)
        self.meter = ReduceMeter(stream)
        """Of the step."""
        self._vote = OverflowVote(self._codec, all_ranks, self._pipeline, self.meter, stream)
        self.ledger = StepLedger(on_open)
        """Of the steps."""
        self.steps = OptimizerSteps(self._refuse_scaler, update=method.direction is not None)
        """Of the optimizers that have the parameters."""
        self._loss_scale: float | None = None
        self._buckets: list[BucketExchange] = []
        """Of the backward pass that is under way."""
        self._under_way = False
        """Whether more buckets of it are to come."""

    def begin_step(self, step: int, loss_scale: float | None) -> None:
        """Open a step that the caller names; see :meth:`GradientReducer.begin_step`.

        Raises:
            CommError: the reducer has failed or was closed, or ``step`` < 1.
        """
        self.settle()
        self.ledger.begin(step)
        self._loss_scale = loss_scale

    def stats(self) -> ReduceStats:
        """What the step's exchanges have cost, once they have ended.

        Raises:
            CommError: an exchange failed, in this step or before.
        """
        self.settle()
        self.ledger.complete()
        n = self._network.all_ranks.world_size
        return self.meter.stats(self._network.take_totals(), 2 * (n - 1) * 4 * self.meter.numel // n)

    def name_of(self, param: Tensor) -> str:
        """The name of a parameter.

        Raises:
            CommError: the reducer does not know it.
        """
        return self._states.of(param).name

    def begin_bucket(
        self, index: int, params: Sequence[Tensor], used: Sequence[bool] | None, shadow: bool = False
    ) -> None:
        """The next gradients to be averaged are those of bucket ``index``.

        Args:
            index: its number in this backward pass.
            params: its parameters.
            used: which of them this rank used; None for all.
            shadow: this rank has run out of inputs and only contributes zeros.

        Raises:
            CommError: they are averaged twice in a step, or the reducer has failed or was closed.
        """
        self.ledger.check()
        # What an earlier bucket's exchange has begun cannot be undone, so all are looked at before the first.
        first = index == 0 and used is None
        counts = not shadow and not self.ledger.named and self._method.keeps_state
        mine = [
            (state.name, state.param)
            for state in (self._states.params.values() if first else map(self._states.of, params))
            if state.param.requires_grad
        ]
        if used is not None:
            mine = [named for named, is_used in zip(mine, used, strict=False) if is_used]
        if counts and (first or used is not None):
            self.steps.check(mine, _WRAP)
        self.ledger.enter(index, f"bucket {index}", _ONCE, counted=shadow)
        if not shadow:
            self.steps.averaged(mine)
        self._under_way = True

    def start_bucket(
        self,
        index: int,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        used: Sequence[bool] | None,
        on_written: Callable[[], None] = lambda: None,
    ) -> None:
        """Send one bucket on its way; with a loss scale, only once all gradients are known. Returns at once.

        Args:
            index: its number in this backward pass.
            params: its parameters.
            grads: their gradients, overwritten with the estimates.
            used: which of them this rank used; None where all take part on every rank.
            on_written: called once the estimates are written, or will not be; maybe twice, by another thread.
        """
        bucket = BucketExchange(
            f"bucket {index}",
            [self._states.of(param) for param in params],
            list(grads),
            method=self._method,
            pipeline=self._pipeline,
            meter=self.meter,
            step=self.ledger.step,
            loss_scale=self._loss_scale or 1.0,
            ready=self._stream.mark(),
            presence=None if used is None else [Presence(here) for here in used],
            on_written=on_written,
        )
        bucket.done.add_done_callback(lambda _: on_written())  # where it failed: nobody waits for ever
        self._buckets.append(bucket)
        if self._loss_scale is None:
            bucket.use()
        else:
            self._vote.check(bucket)

    def end_backward(self) -> None:
        """All gradients are known: issue the last collectives, or with a loss scale vote on whether there are any."""
        self._under_way = False
        self.ledger.complete()
        if self._loss_scale is None:
            self._pipeline.flush()
        else:
            self._vote.decide(list(self._buckets))

    def settle(self) -> None:
        """Wait for all exchanges; raise the first error there was, also one of before."""
        self.ledger.check()
        if self._under_way:
            self._fail(
                CommError(
                    f"the backward of step {self.ledger.step} ended before all of its gradients had come, so its "
                    "peers wait for the rest of it",
                    "look for an exception in that backward that was caught; end the process",
                )
            )
            self.ledger.check()
        buckets, self._buckets = self._buckets, []
        for bucket in buckets:
            try:
                self._wait(bucket)
            except Exception as error:
                self._fail(error)
                raise self._explained(error) from error
        self._stream.join()  # what was written is read in the caller's stream

    def give_up(self, error: BaseException) -> None:
        """A backward pass cannot be completed: if an exchange of it has begun, nothing can be averaged any more."""
        if self._buckets:
            self._fail(error)
        self._under_way = False

    def close(self) -> None:
        """End both threads and drop the process group; after a failure, or in the middle of a pass, issue nothing.

        Raises:
            CommError: a collective did not end within the limit.
        """
        self.steps.close()
        if self._under_way or (self._buckets and sys.exception() is not None):
            self._fail(sys.exception() or CommError("the reducer was closed in the middle of a backward pass"))
        for bucket in self._buckets:
            self._wait(bucket)
        self.ledger.close()
        self._network.close()
        self._codec.close(self._timeout_s)

    def _wait(self, bucket: BucketExchange) -> None:
        self._network.all_ranks.wait(bucket.done, bucket.label, self._codec)

    def _fail(self, error: BaseException) -> None:
        """Nothing can be averaged any more: tell the peers, who would wait for this rank."""
        self._under_way = False
        self._buckets = []
        self.ledger.fail(error)
        self._pipeline.abort(error)
        self._codec.abort(error)
        self._network.leave(error)

    def _explained(self, error: Exception) -> Exception:
        """An overflow that a loss scale brought about is told as such."""
        if isinstance(error, NonFiniteGradient) and self._loss_scale is None:
            scaler = live_scaler()
            if scaler is not None:
                return NonFiniteGradient(
                    f"{error.what}; a GradScaler multiplies losses by {scaler.get_scale():g}, and begin_step() was "
                    "called without loss_scale",
                    _SCALER,
                )
        return error

    def _refuse_scaler(self, scaler: GradScaler) -> None:
        if self._loss_scale is None and self._method.keeps_state:
            raise CommError(
                f"a GradScaler steps the optimizer, with a scale of {scaler.get_scale():g}, but begin_step() was not "
                "told: what error feedback keeps would be scaled by what the scale was then",
                _SCALER,
            )
