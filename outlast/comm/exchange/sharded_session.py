"""What the reducers of sharded models share: communicator, count of steps, cost of a step, state, and failure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from outlast.comm.buffers import BufferPool
from outlast.comm.compressors.base import numel_of
from outlast.comm.config import CommConfig
from outlast.comm.direction import Direction, default_direction
from outlast.comm.exchange.optimizer_steps import OptimizerSteps
from outlast.comm.exchange.sharded import ShardExchange, ShardItem
from outlast.comm.exchange.stats import ReduceMeter, ReduceStats
from outlast.comm.exchange.step_ledger import StepLedger, due
from outlast.comm.feedback import Probe
from outlast.comm.feedback.from_config import feedback_from_config
from outlast.comm.state.reshard import resync, tracked
from outlast.comm.state.sharded_state import ShardedStates
from outlast.comm.state.shards import ShardedParam
from outlast.comm.state.slots import State
from outlast.comm.transport.communicator import CollectiveObserver, Communicator
from outlast.comm.transport.stream import DeviceStream
from outlast.errors import CommError


class ShardSession:
    """Exchanges the gradients of sharded models, and holds their error-feedback state.

    **Making one is a collective call**: it makes a process group of its own. Exchanges block until done. All calls
    belong to one thread.

    Args:
        layout: ``fsdp``, ``hsdp`` or ``zero``: how gradients are cut; state of one layout does not load in another.
        config: see :class:`CommConfig`.
        group: the ranks to average over.
        device: of the gradients.
        observer: notified of every collective.
        direction: of ``target = "update"``; None takes Adam with beta1 = 0, beta2 = 0.95.
        dense_share: given the world size, the bytes that a dense exchange sends of each byte of gradient.

    Raises:
        CommError: no default process group, or a setting that sharded gradients do not allow.
    """

    def __init__(
        self,
        layout: str,
        config: CommConfig,
        group: dist.ProcessGroup,
        device: torch.device,
        observer: CollectiveObserver | None,
        direction: Direction | None,
        dense_share: Callable[[int], float],
    ) -> None:
        if config.compressor == "auto":
            raise CommError(
                "comm.compressor = 'auto' does not work with sharded models", "name a compressor, or set it to 'dense'"
            )
        if config.ranks_per_node != 1:
            raise CommError(
                f"comm.ranks_per_node = {config.ranks_per_node}: sharded gradients are not averaged node by node",
                "set ranks_per_node = 1; with FSDP2 use a two-dimensional mesh (HSDP), which compresses between nodes",
            )
        self.config = config
        self._dense_share = dense_share
        self._stream = DeviceStream(device)
        self._communicator = Communicator(
            group=group, timeout_s=config.timeout_s, observer=observer, stream=self._stream.work
        )
        self.world_size = self._communicator.world_size
        """How many ranks are averaged over."""
        self.rank = self._communicator.rank
        """This rank's place among them."""
        feedback = feedback_from_config(config)
        self._feedback = None if feedback is None else feedback.of_rank(self.rank)
        self._direction = (direction or default_direction()) if config.target == "update" else None
        self.states = ShardedStates(layout, config, self._feedback, self._direction, self.world_size)
        self._buffers = BufferPool(device)
        self._meter = ReduceMeter(self._stream)
        self._ledger = StepLedger(self._open)
        self.steps = OptimizerSteps(self._refuse_scaler, update=self._direction is not None)
        """Of the optimizers that have the parameters."""

    def begin_step(self, step: int) -> None:
        """See :meth:`GradientReducer.begin_step`.

        Raises:
            CommError: an exchange has failed before, or ``step`` < 1.
        """
        self._ledger.begin(step)

    def end_step(self) -> ReduceStats:
        """What the step's exchanges cost.

        Raises:
            CommError: an exchange has failed.
        """
        self.check()
        dense_bytes = int(self._dense_share(self.world_size) * 4 * self._meter.numel)
        return self._meter.stats(self._communicator.take_totals(), dense_bytes)

    def enter(self, key: Hashable, name: str, params: Sequence[tuple[str, Tensor]], once: str, wrap: str) -> None:
        """Note that the gradients ``key`` are about to be exchanged; opens a step if steps are counted.

        Args:
            key: the same in every step.
            name: of the gradients, for errors.
            params: whose gradients they are, as an optimizer has them, with their names.
            once: what to do if they come twice in a step that was named.
            wrap: what to do if they come twice before an optimizer has used them.

        Raises:
            CommError: they were exchanged before, in this step or without an optimizer's step since.
        """
        if not self._ledger.named and self._keeps_state:
            try:
                self.steps.check(params, wrap)
            except CommError as error:
                if not self._ledger.opens(key):  # others of this backward have been exchanged
                    self._ledger.fail(error)
                    self._communicator.leave(error)
                raise
        self._ledger.enter(key, name, once)
        self.steps.averaged(params)

    def current_step(self) -> int:
        """The open step, or the last one; 0 before the first."""
        return self._ledger.step

    def at_step(self, step: int) -> None:
        """Open ``step`` unless it is open."""
        self._ledger.ensure(step)

    def exchange(self, label: str, items: Sequence[ShardItem]) -> None:
        """Exchange ``items``; a collective call, in the same order on every rank. Blocks until done.

        Raises:
            CommError: a peer died or the limit passed; every later call raises it too.
            NonFiniteGradient: on every rank alike.
        """
        self.check()
        step, warmup_steps = self._ledger.step, self.config.warmup_steps
        keep = self._feedback is None or step > max(warmup_steps, 1)
        buffer = self._buffers.of(label, keep=keep)
        with self._meter.blocking(sum(part.numel() for item in items for part in item.parts)):
            self._run(
                lambda: ShardExchange(
                    label,
                    items,
                    self._communicator,
                    self._feedback,
                    self._direction,
                    step <= warmup_steps,
                    buffer,
                    self._meter.probe,
                )
            )

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Live tensors, as :meth:`Reducer.state_dict`; nothing is the same on every rank.

        Raises:
            CommError: an exchange has failed.
        """
        self.check()
        return self.states.state_dict(self._ledger.step)

    def load_state_dict(self, state: State, *, strict: bool = True) -> tuple[str, ...]:
        """Load a copy of the state, all of it or (on an error) none; see :meth:`Reducer.load_state_dict`.

        Raises:
            CommStateMismatch: names the setting, parameter, slot, shape or type that does not fit.
            CommError: an exchange has failed.
        """
        self.check()
        left: list[str] = []
        self._ledger.resume_after(self.states.load_state_dict(state, None if strict else left))
        return tuple(left)

    def close(self) -> None:
        """End the thread and drop the process group. Not a collective call; closing twice is harmless.

        Raises:
            CommError: a collective did not end within the limit.
        """
        self.steps.close()
        self._ledger.close()
        self._communicator.close()

    def check(self) -> None:
        """Raise what has gone wrong before, if anything has.

        Raises:
            CommError: an exchange has failed, or the session was closed.
        """
        self._ledger.check()

    @property
    def _keeps_state(self) -> bool:
        return self._feedback is not None or self._direction is not None

    def _refuse_scaler(self, scaler: GradScaler) -> None:
        if not self._keeps_state:
            return
        raise CommError(
            f"a GradScaler steps the optimizer, with a scale of {scaler.get_scale():g}, which error feedback cannot "
            "follow in sharded gradients",
            "use bfloat16, which needs no scale",
        )

    def _open(self, step: int) -> None:
        """Step ``step`` begins."""
        self._communicator.take_totals()
        self._meter.reset(Probe() if due(step, self.config.probe_every_steps) else None)
        feedback = self._feedback
        if due(step, self.config.resync_every_steps) and feedback is not None and feedback.replicated_slots:
            self._meter.drift = max((self._resync(param) for param in self.states.params.values()), default=0.0)

    def _run(self, make: Callable[[], ShardExchange]) -> None:
        try:
            with self._meter.codec(self._stream.mark()):
                exchange = make()
                exchange.encode()
            self._settle()
            self._communicator.run(exchange.move, "an exchange of sharded gradients")
            with self._meter.codec():
                exchange.decode()
            self._settle()
        except BaseException as error:
            self._ledger.fail(error)
            self._communicator.leave(error)
            raise

    def _resync(self, param: ShardedParam) -> float:
        """Replace the running mean, which drifts by rounding, by the exact one; a collective call.

        Returns:
            The relative drift found.
        """
        feedback = self._feedback
        assert feedback is not None
        own = tracked(feedback, param.local) if param.local else None
        if own is None:
            return 0.0
        plain = replace(param, compress=False, local=None, owned=None, moments={})
        flat = own.reshape(-1)
        mean = torch.empty(numel_of(param.own_shape), dtype=param.dtype, device=param.device)
        item = ShardItem(plain, [flat[cut.start : cut.stop] for cut in param.cuts], mean)
        self._run(partial(self._dense_exchange, f"resync of {param.name}", item))
        return resync(param.owner_slots(feedback), mean.view(param.own_shape)) if mean.numel() else 0.0

    def _dense_exchange(self, label: str, item: ShardItem) -> ShardExchange:
        buffer = self._buffers.of(label, keep=False)
        return ShardExchange(label, [item], self._communicator, None, None, True, buffer)

    def _settle(self) -> None:
        """On CUDA, wait until queued work is done, because another thread or stream reads its result."""
        if self._stream.device.type == "cuda":
            torch.cuda.synchronize(self._stream.device)
