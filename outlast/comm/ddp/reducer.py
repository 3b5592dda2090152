"""Averages gradients over ranks, compressed, with state that belongs to parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import wait
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
from outlast.comm.exchange.bucket import BucketExchange, pass_error
from outlast.comm.exchange.method import ExchangeMethod
from outlast.comm.exchange.overflow import OverflowVote
from outlast.comm.exchange.pipeline import Pipeline
from outlast.comm.exchange.resync import resync_all
from outlast.comm.exchange.stats import ReduceMeter, ReduceStats
from outlast.comm.exchange.step_ledger import StepLedger, due
from outlast.comm.exchange.topology import Network
from outlast.comm.feedback import Feedback, Probe
from outlast.comm.reducer import Reducer
from outlast.comm.state.parameters import ParameterStates
from outlast.comm.transport.communicator import CollectiveObserver
from outlast.comm.transport.stream import DeviceStream
from outlast.comm.transport.worker import OrderedWorker
from outlast.errors import CommError

_REDUCE_BYTES = 8 << 20
_ONCE = "call begin_step() before every step, and wrap all but its last backward in ddp.no_sync()"


class GradientReducer(Reducer):
    """Replaces every gradient by an estimate of its mean over ranks, bit-identical on all of them.

    Under DDP (:meth:`attach`) each bucket is compressed and exchanged while backward goes on, in two threads: one
    compresses and decompresses, one issues collectives. Without DDP, call :meth:`reduce` between ``backward()`` and
    the optimizer's step. Results do not depend on DDP's bucket sizes, on when it rebuilds its buckets, or on
    ``gradient_as_bucket_view``. For gradient accumulation wrap all but the last backward of a step in
    ``ddp.no_sync()``.

    With ``config.target = "update"`` what is averaged is the direction in which Adam would take each rank's gradient.
    The step is then ``x -= lr * grad``, ``torch.optim.SGD(lr, weight_decay)``, and no gradient is clipped.

    With a ``GradScaler``, pass its scale to :meth:`begin_step`. The state is kept unscaled. A step in which some rank's
    gradients overflow leaves the state as it was and Inf in every rank's gradients, so that all scalers skip it.
    Exchanges then begin after backward has ended.

    **Making one is a collective call**: it makes process groups of its own. All calls belong to one thread.

    Failure: when a peer dies or is silent for ``config.timeout_s``, or a gradient that is compressed holds NaN or Inf,
    ``backward()`` (or :meth:`reduce`) raises, as does every later call. The gradients and the state are then undefined:
    end the process and resume from a checkpoint. NaN and Inf are found on every rank in the same step; in tensors that
    are never compressed they pass, as in DDP.

    Args:
        named_parameters: of the model; with DDP those of ``ddp.module``. State is kept under these names.
        config: see :class:`CommConfig`.
        group: the ranks to average over; None for all.
        observer: notified of every collective.
        direction: of ``config.target = "update"``; None takes Adam with beta1 = 0, beta2 = 0.95, clip_rms = 1.
        dense_direction: the same where nothing is compressed (``config.compressor`` is ``dense``, or ``auto`` before or
            when it stays dense); None takes ``direction``, or if that is None too Adam with beta1 = 0.9, beta2 = 0.95,
            clip_rms = 1.
        feedback: a method that settings cannot name (EF21-W with its weights, your own compressor); replaces theirs.
        on_choice: called with what ``config.compressor = "auto"`` became, in the training thread.

    Raises:
        CommError: no default process group; parameters on several devices; a duplicate parameter; a world size that is
            not a multiple of ``config.ranks_per_node``.
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
        parameters = list(named_parameters)
        self._stream = DeviceStream(next((param.device for _, param in parameters), torch.device("cpu")))
        self._network = Network(
            group,
            config.ranks_per_node,
            timeout_s=config.timeout_s,
            observer=observer,
            stream=self._stream.work,
        )
        self.world_size = self._network.all_ranks.world_size
        auto, update = config.compressor == "auto", config.target == "update"
        self._method = ExchangeMethod(
            replace(config, compressor="dense") if auto else config,
            self._network,
            (direction or default_direction()) if update else None,
            (dense_direction or direction or Adam(clip_rms=UPDATE_CLIP_RMS)) if update else None,
            feedback,
            self._stream.device,
        )
        self._states = ParameterStates(
            parameters,
            self._method.config,
            self._method.feedback,
            self._method.direction,
            shape_of=self._network.shape_of,
            units=self._method.units,
            rank=self._network.inter_node.rank,
        )
        states = list(self._states.params.values())
        self._auto = Auto(config, self._network, states, self._stream.device) if auto else None
        self.choice: Choice | None = None
        """What ``compressor = "auto"`` became, and why; None before it was chosen."""
        self._on_choice = on_choice
        all_ranks = self._network.all_ranks
        self._codec = OrderedWorker("outlast-codec")
        self._pipeline = Pipeline(self._codec, all_ranks.submit)
        self._meter = ReduceMeter(self._stream)
        self._vote = OverflowVote(self._codec, all_ranks, self._pipeline, self._meter, self._stream)
        self._ledger = StepLedger(self._open)
        self._loss_scale: float | None = None
        self._buckets: list[BucketExchange] = []
        """Of the backward pass that is under way."""

    def attach(self, ddp: DistributedDataParallel) -> None:
        """Become ``ddp``'s communication hook; call it once, before the first backward.

        Raises:
            CommError: ``ddp`` averages over other ranks than this reducer.
        """
        ranks = dist.get_process_group_ranks(ddp.process_group)
        own = dist.get_process_group_ranks(self._network.all_ranks.group)
        if ranks != own:
            raise CommError(
                f"the model averages over ranks {ranks}, the reducer over {own}", "give both the same group"
            )
        for param in ddp.module.parameters():
            self._states.of(param)
        ddp.register_comm_hook(self, hook)

    def begin_step(self, step: int, loss_scale: float | None = None) -> None:
        """Say which step (1-based) the next backward belongs to; the warm-up depends on it.

        Optional: without it every synchronised backward pass is a step, counted from 1 or from the loaded state. Once
        it has been called it must be called before every step.

        Args:
            step: counts from 1.
            loss_scale: what the loss is multiplied with, ``GradScaler.get_scale()``; the same on every rank.

        Raises:
            CommError: the reducer has failed or was closed, or ``step`` < 1.
        """
        self._finish()
        self._ledger.begin(step)
        self._loss_scale = loss_scale

    def end_step(self) -> ReduceStats:
        """Wait for the step's exchanges, and return what they cost.

        Raises:
            CommError: an exchange failed, in this step or before.
        """
        self._finish()
        self._ledger.complete()
        n = self.world_size
        return self._meter.stats(self._network.take_totals(), 2 * (n - 1) * 4 * self._meter.numel // n)

    def reduce(self) -> None:
        """Average the ``.grad`` of all parameters that require one, in place; for loops without DDP.

        A collective call; blocks until done. A missing gradient counts as zero and is made.

        Raises:
            CommError, NonFiniteGradient: see the class.
        """
        self._finish()
        self._ledger.enter(0, "bucket 0", _ONCE)
        batch: list[Tensor] = []
        size = index = 0
        for param in reversed([state.param for state in self._states.params.values() if state.param.requires_grad]):
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            if batch and (batch[0].dtype != param.dtype or size >= _REDUCE_BYTES):
                self._start(f"bucket {index}", batch)
                batch, size, index = [], 0, index + 1
            batch.append(param)
            size += param.grad.numel() * param.grad.element_size()
        if batch:
            self._start(f"bucket {index}", batch)
        self._backward_done()
        self._finish()

    def on_bucket(self, bucket: Bucket) -> torch.futures.Future[Tensor]:
        """DDP's hook: queue a bucket and return at once; the future completes with the bucket's buffer, averaged."""
        label = f"bucket {bucket.index()}"
        if self._ledger.enter(bucket.index(), label, _ONCE):
            at_end_of_backward(self._finish)
        buffer, future = bucket.buffer(), self._stream.future()
        exchange = self._start(
            label, bucket.parameters(), bucket.gradients(), on_written=lambda: future.set_result(buffer)
        )
        exchange.done.add_done_callback(partial(pass_error, target=future))
        if bucket.is_last():
            self._backward_done()
        return future

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Error-feedback state for a checkpoint; see :meth:`Reducer.state_dict`.

        Tensors have the shape of their parameter, or with ``ranks_per_node`` of this rank's slice of it.

        Raises:
            CommError: the reducer has failed.
        """
        self._finish()
        return self._states.state_dict(self._ledger.step, self.world_size)

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """See :meth:`Reducer.load_state_dict`.

        Raises:
            CommStateMismatch: names what does not fit; nothing has been loaded then.
            CommError: the reducer has failed.
        """
        self._finish()
        self._take_choice(state["meta"])
        self._ledger.resume_after(self._states.load_state_dict(state, self.world_size))

    def load_resharded(self, read: Callable[[int], Mapping[str, Mapping[str, Any]]], ranks: int) -> None:
        """Load the state of ``ranks`` ranks, on this number of ranks.

        Kept is what all estimates to come depend on: the sum over ranks, over their number, of what was not sent, and
        the mean of what is tracked. With as many ranks as before it is :meth:`load_state_dict`, to the bit.

        Args:
            read: given a rank of the run that saved, what its :meth:`state_dict` was; called for those that matter to
                this rank, one at a time. With fewer ranks than before, together they read all.
            ranks: how many ranks saved.

        Raises:
            CommStateMismatch: names what does not fit; nothing has been loaded then.
            CommError: the reducer has failed.
        """
        rank, n = self._network.all_ranks.rank, self.world_size
        if ranks == n:
            self.load_state_dict(read(rank))
            return
        self._finish()
        self._take_choice(read(0)["meta"])
        state = self._states.resharded(read, ranks, n, rank, self._method.of_all)
        self._ledger.resume_after(self._states.load_state_dict(state, n))

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
        return resync_all(self._states, self._method.feedback, self._network, self._method.two_phase)

    def check(self) -> None:
        """Raise what has gone wrong before, if anything has.

        Raises:
            CommError: an exchange has failed, or the reducer was closed.
        """
        self._ledger.check()

    def close(self) -> None:
        """End both threads and drop the process group. Not a collective call; closing twice is harmless.

        Raises:
            CommError: a collective did not end within the limit.
        """
        self._ledger.close()
        self._pipeline.flush()
        # Codec and communicator hand jobs to one another; both are idle once all exchanges are done.
        wait([bucket.done for bucket in self._buckets], timeout=self.config.timeout_s + 10)
        self._network.close()
        self._codec.close(self.config.timeout_s)

    def _open(self, step: int) -> None:
        """Step ``step`` begins."""
        if self._auto is not None:
            self.choice = self._auto.next_step(self._meter)
            if self.choice is not None:
                self._adopt(self.choice.config)
                if self._on_choice is not None:
                    self._on_choice(self.choice)
        self._network.take_totals()
        self._meter.reset(Probe() if due(step, self.config.probe_every_steps) else None)
        feedback = self._method.feedback
        if due(step, self.config.resync_every_steps) and feedback is not None and feedback.replicated_slots:
            self._meter.drift = self.resync()

    def _take_choice(self, meta: Mapping[str, Any]) -> None:
        """What ``auto`` chose is part of the state: a run that goes on does not choose again."""
        method = meta.get("method", {})
        if self.config.compressor == "auto" and (
            method.get("compressor") != "dense" or int(meta["step"]) > DENSE_STEPS
        ):
            self._adopt(replace(self.config, **method))

    def _adopt(self, config: CommConfig) -> None:
        """Compress as ``config`` says from the next exchange on; ``auto`` has been decided."""
        self._auto = None
        self._method.use(config)
        self._states.adopt(config, self._method.feedback, self._method.direction, self._method.units)

    def _start(
        self,
        label: str,
        params: list[Tensor],
        grads: list[Tensor] | None = None,
        *,
        on_written: Callable[[], None] = lambda: None,
    ) -> BucketExchange:
        """Send one bucket on its way; with a loss scale, only once all gradients are known.

        ``grads`` None takes those of ``params``.
        """
        bucket = BucketExchange(
            label,
            [self._states.of(param) for param in params],
            [param.grad for param in params if param.grad is not None] if grads is None else grads,
            method=self._method,
            pipeline=self._pipeline,
            meter=self._meter,
            step=self._ledger.step,
            loss_scale=self._loss_scale or 1.0,
            ready=self._stream.mark(),
            on_written=on_written,
        )
        self._buckets.append(bucket)
        if self._loss_scale is None:
            bucket.use()
        else:
            self._vote.check(bucket)
        return bucket

    def _backward_done(self) -> None:
        """All gradients are known: issue the last collectives, or with a loss scale vote on whether there are any."""
        self._ledger.complete()
        if self._loss_scale is None:
            self._pipeline.flush()
        else:
            self._vote.decide(list(self._buckets))

    def _finish(self) -> None:
        """Wait for all exchanges; raise the first error there was."""
        self._ledger.check()
        buckets, self._buckets = self._buckets, []
        for bucket in buckets:
            try:
                bucket.done.result()
            except Exception as error:
                self._ledger.fail(error)
        self._stream.join()  # what was written is read in the caller's stream
        self._ledger.check()
