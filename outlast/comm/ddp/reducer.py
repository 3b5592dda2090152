"""Averages gradients over ranks, compressed, with state that belongs to parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from outlast.comm.auto.chooser import Auto
from outlast.comm.auto.policy import DENSE_STEPS, Choice
from outlast.comm.config import UPDATE_CLIP_RMS, CommConfig
from outlast.comm.ddp.averager import BucketAverager
from outlast.comm.ddp.backward import DdpBackward
from outlast.comm.ddp.checks import refuse_complex, refuse_sparse_gradient
from outlast.comm.direction import Adam, Direction, default_direction
from outlast.comm.exchange.adam_settings import followed
from outlast.comm.exchange.kept_optimizer import KeptOptimizer, check_optimizer
from outlast.comm.exchange.method import ExchangeMethod
from outlast.comm.exchange.resync import resync_all
from outlast.comm.exchange.stats import ReduceStats
from outlast.comm.exchange.step_ledger import due
from outlast.comm.exchange.topology import Network
from outlast.comm.feedback import Feedback, Probe
from outlast.comm.reducer import Reducer
from outlast.comm.state.adam_moments import WholeMoments
from outlast.comm.state.parameters import ParameterStates
from outlast.comm.transport.communicator import CollectiveObserver
from outlast.comm.transport.stream import DeviceStream
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
    The step is then ``x -= lr * grad``, of ``optimizer``, or of ``torch.optim.SGD(lr, weight_decay)``, and no gradient
    is clipped.

    Without :meth:`begin_step`, a step is what an optimizer's step ends. Gradients that are averaged again before any
    ``torch.optim.Optimizer`` that has them made a step are an error. Where no optimizer of torch's has the parameters,
    every average is a step.

    With a ``GradScaler``, pass its scale to :meth:`begin_step`; without, its step is an error. The state is kept
    unscaled. A step in which some rank's gradients overflow leaves the state as it was and Inf in every rank's
    gradients, so that all scalers skip it. Exchanges then begin after backward has ended.

    A parameter that no rank used in a step (``find_unused_parameters``, ``static_graph``) keeps its state, as DDP keeps
    its ``.grad``: nothing that is sent is lost.

    **Making one is a collective call**: it makes process groups of its own. All calls belong to one thread.

    Failure: when a peer dies or is silent for ``config.timeout_s``, or a gradient that is compressed holds NaN or Inf,
    ``backward()`` (or :meth:`reduce`) raises, as does every later call but :meth:`close`. The gradients and the state
    are then undefined: resume from a checkpoint, or close this reducer and attach a new one, on all ranks. A rank that
    fails alone (an error in its backward, of memory, of its own) leaves the exchange, and its peers' errors name it and
    its reason. NaN and Inf are found on every rank in the same step; in tensors that are never compressed they pass, as
    in DDP.

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
        optimizer: for ``config.target = "update"``: the AdamW, or Adam, that applies the updates; see
            :func:`outlast.comm.attach`.

    Raises:
        CommError: no default process group; parameters on several devices; a duplicate parameter; a world size that is
            not a multiple of ``config.ranks_per_node``; a complex parameter; an optimizer that cannot be kept.
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
        optimizer: Optimizer | None = None,
    ) -> None:
        self.config = config
        parameters = list(named_parameters)
        params = [param for _, param in parameters]
        follows = followed(optimizer, config, params, direction, dense_direction)
        if optimizer is not None and follows is not None:
            check_optimizer(optimizer, params)
            direction, dense_direction = follows.compressed, follows.dense
        refuse_complex(parameters)
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
        self._averager = BucketAverager(
            self._network, self._method, self._states, self._stream, config.timeout_s, self._open
        )
        self._ddp: DdpBackward | None = None
        if optimizer is not None and follows is not None:
            moments, ledger = WholeMoments(self._states), self._averager.ledger
            self.kept = KeptOptimizer(optimizer, moments, follows, self._averager.settle, lambda: ledger.step)
            self._averager.steps.kept = self.kept

    def attach(self, ddp: DistributedDataParallel) -> None:
        """Average what ``ddp`` would average, from the next backward on; :meth:`close` ends that.

        Raises:
            CommError: ``ddp`` averages over other ranks than this reducer, has another communication hook, or is set up
                in a way that cannot be followed: ``python_reducer``, ``skip_all_reduce_unused_params``,
                ``mixed_precision``, ``delay_all_reduce_named_params``, or modules that make sparse gradients.
        """
        ranks = dist.get_process_group_ranks(ddp.process_group)
        own = dist.get_process_group_ranks(self._network.all_ranks.group)
        if ranks != own:
            raise CommError(
                f"the model averages over ranks {ranks}, the reducer over {own}", "give both the same group"
            )
        for param in ddp.module.parameters():
            self._states.of(param)
        self._ddp = DdpBackward(ddp, self._averager, self._stream)

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
        self._averager.begin_step(step, loss_scale)

    def end_step(self) -> ReduceStats:
        """Wait for the step's exchanges, and return what they cost.

        Raises:
            CommError: an exchange failed, in this step or before.
        """
        return self._averager.stats()

    def reduce(self) -> None:
        """Average the ``.grad`` of all parameters that require one, in place; for loops without DDP.

        A collective call; blocks until done. A missing gradient counts as zero and is made.

        Raises:
            CommError, NonFiniteGradient: see the class.
        """
        self._averager.settle()
        states = [state for state in self._states.params.values() if state.param.requires_grad]
        for state in states:
            if state.param.grad is None:
                state.param.grad = torch.zeros_like(state.param)
            refuse_sparse_gradient(state.name, state.param.grad)
        self._averager.begin_bucket(0, [state.param for state in states], None)
        batches: list[list[Tensor]] = []
        size = 0
        for param in reversed([state.param for state in states]):
            if not batches or batches[-1][0].dtype != param.dtype or size >= _REDUCE_BYTES:
                batches.append([])
                size = 0
            batches[-1].append(param)
            size += param.numel() * param.element_size()
        for index, batch in enumerate(batches):
            self._averager.start_bucket(index, batch, [param.grad for param in batch if param.grad is not None], None)
        self._averager.end_backward()
        self._averager.settle()

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Error-feedback state for a checkpoint; see :meth:`Reducer.state_dict`.

        Tensors have the shape of their parameter, or with ``ranks_per_node`` of this rank's slice of it.

        Raises:
            CommError: the reducer has failed.
        """
        self._averager.settle()
        return self._states.state_dict(self._averager.ledger.step, self.world_size)

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]], *, strict: bool = True) -> tuple[str, ...]:
        """See :meth:`Reducer.load_state_dict`.

        Raises:
            CommStateMismatch: names what does not fit; nothing has been loaded then.
            CommError: the reducer has failed.
        """
        self._averager.settle()
        self._take_choice(state["meta"])
        left: list[str] = []
        step = self._states.load_state_dict(state, self.world_size, None if strict else left)
        self._resume_after(step)
        return tuple(left)

    def load_resharded(
        self, read: Callable[[int], Mapping[str, Mapping[str, Any]]], ranks: int, *, strict: bool = True
    ) -> tuple[str, ...]:
        """Load the state of ``ranks`` ranks, on this number of ranks.

        Kept is what all estimates to come depend on: the sum over ranks, over their number, of what was not sent, and
        the mean of what is tracked. With as many ranks as before it is :meth:`load_state_dict`, to the bit.

        Args:
            read: given a rank of the run that saved, what its :meth:`state_dict` was; called for those that matter to
                this rank, one at a time. With fewer ranks than before, together they read all.
            ranks: how many ranks saved.
            strict: see :meth:`Reducer.load_state_dict`, as for what is returned.

        Raises:
            CommStateMismatch: names what does not fit; nothing has been loaded then.
            CommError: the reducer has failed.
        """
        rank, n = self._network.all_ranks.rank, self.world_size
        if ranks == n:
            return self.load_state_dict(read(rank), strict=strict)
        self._averager.settle()
        self._take_choice(read(0)["meta"])
        state = self._states.resharded(read, ranks, n, rank, self._method.of_all)
        left: list[str] = []
        self._resume_after(self._states.load_state_dict(state, n, None if strict else left))
        return tuple(left)

    def resync(self) -> float:
        """Replace the running means of what ranks track by exact ones; a collective call, between steps.

        Rounding lets the two drift apart, by about 1e-7 a step in fp32. :meth:`begin_step` calls this every
        ``config.resync_every_steps`` steps.

        Returns:
            The largest drift of a tensor, relative to it; 0 where nothing is tracked. The same on every rank.

        Raises:
            CommError: the reducer has failed, or a peer.
        """
        self._averager.settle()
        return resync_all(self._states, self._method.feedback, self._network, self._method.two_phase)

    def check(self) -> None:
        """Raise what has gone wrong before, if anything has.

        Raises:
            CommError: an exchange has failed, or the reducer was closed.
        """
        self._averager.ledger.check()

    def close(self) -> None:
        """End both threads, drop the process group, and let DDP average by itself again, densely. What was not sent yet
        is lost. An optimizer that was kept gets its moments, and goes on alone. Not a collective call; closing twice is
        harmless.

        After a failure, or in the middle of a backward pass, it issues nothing: peers that wait for this rank get an
        error that names it and the exception that is being handled here.

        Raises:
            CommError: a collective did not end within the limit.
        """
        if self._ddp is not None:
            self._ddp.detach()
        try:
            self._averager.close()
        finally:
            if self.kept is not None:
                self.kept.release()

    def _resume_after(self, step: int) -> None:
        self._averager.ledger.resume_after(step)
        if self.kept is not None:
            self.kept.reducer_loaded()

    def _open(self, step: int) -> None:
        """Step ``step`` begins."""
        if self._auto is not None:
            self.choice = self._auto.next_step(self._averager.meter)
            if self.choice is not None:
                self._adopt(self.choice.config)
                if self._on_choice is not None:
                    self._on_choice(self.choice)
        self._network.take_totals()
        self._averager.meter.reset(Probe() if due(step, self.config.probe_every_steps) else None)
        feedback = self._method.feedback
        if due(step, self.config.resync_every_steps) and feedback is not None and feedback.replicated_slots:
            self._averager.meter.drift = self.resync()

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
