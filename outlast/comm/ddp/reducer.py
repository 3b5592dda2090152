"""Averages gradients over ranks, compressed, with state that belongs to parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from outlast.comm.auto.chooser import Auto
from outlast.comm.auto.policy import DENSE_STEPS, Choice
from outlast.comm.config import UPDATE_CLIP_RMS, CommConfig
from outlast.comm.ddp.hook import Bucket, at_end_of_backward, hook
from outlast.comm.direction import Adam, Direction, default_direction
from outlast.comm.exchange.bucket import BucketExchange, complete, pass_error
from outlast.comm.exchange.item import Stage
from outlast.comm.exchange.method import ExchangeMethod
from outlast.comm.exchange.overflow import OverflowVote, make_infinite
from outlast.comm.exchange.pipeline import Pipeline
from outlast.comm.exchange.resync import resync_all
from outlast.comm.exchange.stats import Meter, ReduceStats
from outlast.comm.exchange.topology import Network
from outlast.comm.feedback import Feedback, Probe
from outlast.comm.reducer import Reducer
from outlast.comm.state.parameters import ParameterStates
from outlast.comm.transport.communicator import CollectiveObserver
from outlast.comm.transport.stream import DeviceStream
from outlast.comm.transport.worker import OrderedWorker
from outlast.errors import CommError

_REDUCE_BYTES = 8 << 20


class GradientReducer(Reducer):
    """Replaces every gradient by an estimate of its mean over ranks, bit-identical on all of them.

    Under DDP (:meth:`attach`) each bucket is compressed and exchanged while backward goes on, in two threads: one
    compresses and decompresses, one issues collectives. Without DDP, call :meth:`reduce` between ``backward()`` and
    the optimizer's step. Results do not depend on DDP's bucket sizes, on when it rebuilds its buckets, or on
    ``gradient_as_bucket_view``. For gradient accumulation wrap all but the last backward of a step in
    ``ddp.no_sync()``.

    With ``config.target = "update"`` what is averaged is the direction in which Adam would take each rank's gradient.
    The step is then ``x -= lr * grad``, ``torch.optim.SGD(lr, weight_decay)``, and what is averaged is not clipped.

    With a ``GradScaler`` tell :meth:`begin_step` its scale: the state is kept unscaled, and a step in which a rank's
    gradients overflow leaves the state as it was and Inf in every rank's gradients, so that all scalers skip it.
    Exchanges then begin when backward has ended.

    **Making one is a collective call**: it makes process groups of its own. All calls belong to one thread.

    Failure: when a peer dies or is silent for ``config.timeout_s``, or a gradient that is compressed holds NaN or Inf,
    ``backward()`` (or :meth:`reduce`) raises, as does every later call. The gradients and the state are then undefined:
    end the process and resume from a checkpoint. NaN and Inf are found on every rank in the same step; in tensors that
    are never compressed they pass, as in DDP.

    Args:
        named_parameters: of the model; with DDP those of ``ddp.module``. State is kept under these names.
        config: see :class:`CommConfig`.
        group: the ranks to average over; None for all.
        observer: told of every collective.
        direction: of ``config.target = "update"``; None takes Adam with beta1 = 0, beta2 = 0.95, clip_rms = 1.
        dense_direction: the same where nothing is compressed (``config.compressor`` is ``dense``, or ``auto`` before or
            when it stays dense); None takes ``direction``, or if that is None too Adam with beta1 = 0.9, beta2 = 0.95,
            clip_rms = 1.
        feedback: a method that settings cannot name (EF21-W's weights, a compressor of one's own), in place of theirs.
        on_choice: called with what ``config.compressor = "auto"`` became, in the training thread.

    Raises:
        CommError: no default process group; parameters on several devices; a parameter that comes twice; ranks that are
            no multiple of ``config.ranks_per_node``.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        config: CommConfig,
        *,
        group: dist.ProcessGroup | None = None,
        observer: CollectiveObserver | None = None,
        direction: Direction | None = None,
        dense_direction: Direction | None = None,
        feedback: Feedback | None = None,
        on_choice: Callable[[Choice], None] | None = None,
    ) -> None:
        self.config = config
        auto = config.compressor == "auto"
        parameters = list(named_parameters)
        self._lane = DeviceStream(next((param.device for _, param in parameters), torch.device("cpu")))
        self._network = Network(
            group,
            config.ranks_per_node,
            timeout_s=config.timeout_s,
            observer=observer,
            stream=self._lane.work,
        )
        self.world_size = self._network.whole.world_size
        self._plan = ExchangeMethod(
            replace(config, compressor="dense") if auto else config,
            self._network,
            (direction or default_direction()) if config.target == "update" else None,
            (dense_direction or direction or Adam(clip_rms=UPDATE_CLIP_RMS)) if config.target == "update" else None,
            feedback,
            self._lane.device,
        )
        self._store = ParameterStates(
            parameters,
            self._plan.config,
            self._plan.feedback,
            self._plan.direction,
            shape_of=self._network.shape_of,
            units=self._plan.units,
            rank=self._network.rail.rank,
        )
        states = list(self._store.params.values())
        self._auto = Auto(config, self._network, states, self._lane.device) if auto else None
        self.choice: Choice | None = None
        """What ``compressor = "auto"`` became, and why; None before it was chosen."""
        self._on_choice = on_choice
        self._codec = OrderedWorker("outlast-codec")
        self._pipeline = Pipeline(self._codec, self._network.whole.submit)
        self._vote = OverflowVote(self._codec, self._network.whole, self._lane.device)
        self._meter = Meter(self._lane)
        self._failure: BaseException | None = None
        self._closed = False
        self._step = 0
        self._step_is_given = False
        self._loss_scale: float | None = None
        self._backward_done = True
        self._seen: set[int] = set()
        self._running: list[BucketExchange] = []

    def attach(self, ddp: DistributedDataParallel) -> None:
        """Become ``ddp``'s communication hook; to be called once, before the first backward.

        Raises:
            CommError: ``ddp`` averages over other ranks than this reducer.
        """
        ranks = dist.get_process_group_ranks(ddp.process_group)
        mine = dist.get_process_group_ranks(self._network.whole.group)
        if ranks != mine:
            raise CommError(
                f"the model averages over ranks {ranks}, the reducer over {mine}", "give both the same group"
            )
        for param in ddp.module.parameters():
            self._store.of(param)
        ddp.register_comm_hook(self, hook)

    def begin_step(self, step: int, loss_scale: float | None = None) -> None:
        """Say which step (1-based) the next backward belongs to; the warm-up goes by it.

        Optional: without it every synchronised backward pass is a step, counted on from 1 or from the loaded state.
        Once it has been called it is due before every step.

        Args:
            step: counts from 1.
            loss_scale: what the loss is multiplied with, ``GradScaler.get_scale()``; the same on every rank.

        Raises:
            CommError: the reducer has failed or was closed, or ``step`` < 1.
        """
        if step < 1:
            raise CommError(f"begin_step({step}): steps count from 1")
        self._finish()
        self._step_is_given = True
        self._loss_scale = loss_scale
        self._open(step)

    def end_step(self) -> ReduceStats:
        """Wait for the step's exchanges, and say what they cost.

        Raises:
            CommError: an exchange failed, in this step or before.
        """
        self._finish()
        self._backward_done = True
        return self._meter.stats(self._network.take_traffic(), self.world_size)

    def reduce(self) -> None:
        """Average the ``.grad`` of all parameters that require one, in place; for loops without DDP.

        A collective call; blocks until done. A missing gradient counts as zero and is made.

        Raises:
            CommError, NonFiniteGradient: see the class.
        """
        self._finish()
        self._next_backward(bucket=0)
        batch: list[tuple[Tensor, Tensor]] = []
        size = index = 0
        states = [state for state in self._store.params.values() if state.param.requires_grad]
        for position, state in enumerate(reversed(states), 1):
            param = state.param
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            same = not batch or batch[0][0].dtype == param.dtype
            if batch and not (same and size < _REDUCE_BYTES):
                self._start(f"bucket {index}", [p for p, _ in batch], [g for _, g in batch])
                batch, size, index = [], 0, index + 1
            batch.append((param, param.grad))
            size += param.grad.numel() * param.grad.element_size()
            if position == len(states):
                self._start(f"bucket {index}", [p for p, _ in batch], [g for _, g in batch])
        self._backward_done = True
        self._all_ready()
        self._finish()

    def on_bucket(self, bucket: Bucket) -> torch.futures.Future[Tensor]:
        """DDP's hook: queue a bucket and return at once; the future completes with the bucket's buffer, averaged."""
        index = bucket.index()
        if self._next_backward(index):
            at_end_of_backward(self._finish)
        buffer, future = bucket.buffer(), self._lane.future()
        running = self._start(
            f"bucket {index}", bucket.parameters(), bucket.gradients(), lambda: future.set_result(buffer)
        )
        running.done.add_done_callback(partial(pass_error, target=future))
        self._backward_done = bucket.is_last()
        if self._backward_done:
            self._all_ready()
        return future

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Error-feedback state, for a checkpoint; to be called between steps.

        Returns:
            ``{"local": {parameter: {slot: tensor}}, "replicated": {parameter: {slot: tensor}}, "meta": {...}}``. Local
            tensors differ on every rank and must be saved by each, replicated ones are the same on all, ``meta`` is
            plain JSON. The tensors have their parameter's shape and are *live*: the next backward changes them.

        Raises:
            CommError: the reducer has failed.
        """
        self._finish()
        return self._store.state_dict(self._step, self.world_size)

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over a copy of what :meth:`state_dict` gave on the same rank; training goes on bit for bit.

        Raises:
            CommStateMismatch: names what does not fit; nothing has been taken over then.
            CommError: the reducer has failed.
        """
        self._finish()
        self._take_choice(state["meta"])
        self._step = self._store.load_state_dict(state, self.world_size)

    def load_resharded(self, read: Callable[[int], Mapping[str, Mapping[str, Any]]], ranks: int) -> None:
        """Take over the state of ``ranks`` ranks, on this number of ranks.

        What all estimates to come depend on is kept: of what was not sent the sum over ranks over their number, of what
        is tracked the mean. With as many ranks as before it is :meth:`load_state_dict`, to the bit.

        Args:
            read: given a rank of the run that saved, what its :meth:`state_dict` was; called for those that matter to
                this rank, one at a time. With fewer ranks than before, together they read all.
            ranks: how many ranks saved.

        Raises:
            CommStateMismatch: names what does not fit; nothing has been taken over then.
            CommError: the reducer has failed.
        """
        rank, n = self._network.whole.rank, self.world_size
        if ranks == n:
            self.load_state_dict(read(rank))
            return
        self._finish()
        self._take_choice(read(0)["meta"])
        state = self._store.resharded(read, ranks, n, rank, self._plan.of_all)
        self._step = self._store.load_state_dict(state, n)

    def resync(self) -> float:
        """Replace the running means of what ranks track by exact ones; a collective call, between steps.

        Rounding lets the two drift apart, by about 1e-7 a step in fp32. :meth:`begin_step` calls this every
        ``config.resync_every_steps`` steps.

        Returns:
            The largest drift of a tensor, relative to it; 0 where nothing is tracked. The same on every rank.

        Raises:
            CommError: the reducer has failed, or a peer.
        """
        self._finish()
        return resync_all(self._store, self._plan.feedback, self._network, self._plan.two_phase)

    def close(self) -> None:
        """End both threads and drop the process group. Not a collective call; closing twice is harmless.

        Raises:
            CommError: a collective did not end within the limit.
        """
        self._closed = True
        self._pipeline.flush()
        # Codec and communicator hand jobs to one another; both are idle once all exchanges are done.
        wait([running.done for running in self._running], timeout=self.config.timeout_s + 10)
        self._network.close()
        self._codec.close(self.config.timeout_s)

    def _next_backward(self, bucket: int) -> bool:
        """Note that ``bucket`` is ready; whether it is the first of its backward pass."""
        self.check()
        if self._step_is_given:
            if bucket in self._seen:
                raise CommError(
                    f"gradients of bucket {bucket} were averaged twice in step {self._step}",
                    "call begin_step() before every step, and wrap all but its last backward in ddp.no_sync()",
                )
        elif self._backward_done:
            self._open(self._step + 1)
        first = not self._seen
        self._seen.add(bucket)
        return first

    def _open(self, step: int) -> None:
        self._step = step
        self._seen = set()
        self._backward_done = False
        if self._auto is not None:
            self.choice = self._auto.next_step(self._meter)
            if self.choice is not None:
                self._auto = None
                self._adopt(self.choice.config)
                if self._on_choice is not None:
                    self._on_choice(self.choice)
        self._network.take_traffic()
        self._meter.reset()
        every = self.config.probe_every_steps
        if every and step % every == 0:
            self._meter.probe = Probe()
        every = self.config.resync_every_steps
        feedback = self._plan.feedback
        if every and step % every == 0 and feedback is not None and feedback.replicated_slots:
            self._meter.drift = self.resync()

    def _take_choice(self, meta: Mapping[str, Any]) -> None:
        """What ``auto`` chose is part of the state: a run that goes on does not choose again."""
        method = meta.get("method", {})
        if self.config.compressor == "auto" and (
            method.get("compressor") != "dense" or int(meta["step"]) > DENSE_STEPS
        ):
            self._auto = None
            self._adopt(replace(self.config, **method))

    def _adopt(self, method: CommConfig) -> None:
        """Compress with another method from the next exchange on."""
        self._plan.use(method)
        self._store.adopt(method, self._plan.feedback, self._plan.direction, self._plan.units)

    def _start(
        self,
        label: str,
        params: list[Tensor],
        grads: list[Tensor],
        finished: Callable[[], None] = lambda: None,
    ) -> BucketExchange:
        """Send one bucket on its way through the two threads; with a loss scale, only once all gradients are known."""
        states = [self._store.of(param) for param in params]
        running = BucketExchange(label, states, grads, finished, self._lane.mark())
        self._running.append(running)
        self._meter.ready(sum(grad.numel() for grad in grads))
        if self._loss_scale is None:
            self._begin(running)
        else:
            self._vote.look(grads).add_done_callback(partial(pass_error, target=running.done))
        return running

    def _begin(self, running: BucketExchange) -> None:
        *others, last = self._plan.stages(running, self._step, self._loss_scale or 1.0, self._meter.probe)

        def finish() -> None:
            last.work()
            running.finished()
            self._meter.done()

        stages = [*others, Stage("codec", finish)]
        run = self._pipeline.start([self._metered(stage, running.ready) for stage in stages])
        run.done.add_done_callback(partial(complete, target=running.done))

    def _all_ready(self) -> None:
        """All gradients are known: let the last collectives go, or with a loss scale agree on whether there are any."""
        if self._loss_scale is None:
            self._pipeline.flush()
            return
        held = list(self._running)

        def use() -> None:
            for running in held:
                self._begin(running)
            self._pipeline.flush()

        def skip() -> None:
            self._meter.skipped = True
            for running in held:
                make_infinite(running.grads)
                running.finished()
                running.done.set_result(None)

        def failed(future: Future[None]) -> None:
            for running in held:
                pass_error(future, running.done)

        self._vote.decide(use, skip, failed)

    def _metered(self, stage: Stage, ready: torch.cuda.Event | None) -> Stage:
        """A codec's stage in its lane, with its time taken."""
        if stage.thread == "wire":
            return stage

        def work() -> None:
            with self._meter.codec(ready):
                stage.work()

        return Stage("codec", work)

    def _finish(self) -> None:
        """Wait for all exchanges; raise the first error there was."""
        self.check()
        running, self._running = self._running, []
        for one in running:
            try:
                one.done.result()
            except Exception as error:
                self._failure = self._failure or error
        self.check()

    def check(self) -> None:
        """Raise what has gone wrong before, if anything has.

        Raises:
            CommError: an exchange has failed, or the reducer was closed.
        """
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise CommError("the reducer was closed")
