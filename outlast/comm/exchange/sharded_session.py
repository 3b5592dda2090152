"""What the reducers of sharded models share: communicator, count of steps, cost of a step, state, and failure."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from outlast.comm.compressors import Shape, Slots
from outlast.comm.compressors.base import numel_of
from outlast.comm.config import CommConfig
from outlast.comm.direction import Direction, default_direction
from outlast.comm.exchange.sharded import ShardExchange, ShardItem
from outlast.comm.exchange.stats import ReduceStats
from outlast.comm.feedback import Feedback
from outlast.comm.feedback.from_config import feedback_from_config
from outlast.comm.feedback.probe import Probe
from outlast.comm.state.reshard import resync, tracked
from outlast.comm.state.shards import Shards, of_slice
from outlast.comm.transport.communicator import CollectiveObserver, Communicator
from outlast.comm.transport.stream import DeviceStream
from outlast.errors import CommError, CommStateMismatch

VERSION = 1
Forms = dict[str, tuple[Shape, torch.dtype]]
_FIX = "it belongs to another model, or to other [comm] settings"


class ShardSession:
    """Exchanges the gradients of sharded models, and holds their error-feedback state.

    **Making one is a collective call**: it makes a process group of its own. Exchanges block until done. All calls
    belong to one thread.

    Args:
        layout: what cuts the gradients; state of one layout does not load in another.
        config: see :class:`CommConfig`.
        group: the ranks to average over.
        device: of the gradients.
        observer: told of every collective.
        direction: of ``target = "update"``; None takes Adam with beta1 = 0, beta2 = 0.95.
        dense_share: bytes that a dense exchange sends of each byte of gradient.

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
                "comm.compressor = 'auto' knows nothing of sharded models", "name a compressor, or set it to 'dense'"
            )
        if config.ranks_per_node != 1:
            raise CommError(
                f"comm.ranks_per_node = {config.ranks_per_node}: sharded gradients are not averaged node by node",
                "set ranks_per_node = 1; with FSDP2 use a two-dimensional mesh (HSDP), which compresses between nodes",
            )
        self.config = config
        self.shards: dict[str, Shards] = {}
        self.step = 0
        self._layout = layout
        feedback = feedback_from_config(config)
        self._direction = (direction or default_direction()) if config.target == "update" else None
        self._dense_share = dense_share
        self._lane = DeviceStream(device)
        self._communicator = Communicator(
            group=group, timeout_s=config.timeout_s, observer=observer, stream=self._lane.work
        )
        self._feedback = None if feedback is None else feedback.of_rank(self._communicator.rank)
        self._buffers: dict[str, Tensor] = {}
        self._failure: BaseException | None = None
        self._closed = False
        self._step_is_given = False
        self._between_steps = True
        self._seen: set[Hashable] = set()
        self._numel = 0
        self._codec_s = self._exposed_s = 0.0
        self._probe: Probe | None = None
        self._drift: float | None = None

    @property
    def world_size(self) -> int:
        """How many ranks are averaged over."""
        return self._communicator.world_size

    @property
    def rank(self) -> int:
        """This rank's place among them."""
        return self._communicator.rank

    def compresses(self, shape: Shape) -> bool:
        """Whether a parameter of ``shape`` is compressed outside warm-up."""
        numel = torch.Size(shape).numel()
        return self._feedback is not None and len(shape) > 1 and numel >= max(self.config.dense_below, 1)

    def begin_step(self, step: int) -> None:
        """See :meth:`GradientReducer.begin_step`.

        Raises:
            CommError: an exchange has failed before, or ``step`` < 1.
        """
        if step < 1:
            raise CommError(f"begin_step({step}): steps count from 1")
        self.check()
        self._step_is_given = True
        self._open(step)

    def end_step(self) -> ReduceStats:
        """What the step's exchanges cost.

        Raises:
            CommError: an exchange has failed.
        """
        self.check()
        traffic = self._communicator.take_totals()
        probe = self._probe if self._probe is not None and self._probe.gradient_square > 0 else None
        return ReduceStats(
            wire_bytes=traffic.wire_bytes,
            dense_bytes=int(self._dense_share(self.world_size) * 4 * self._numel),
            codec_s=self._codec_s,
            collective_s=traffic.collective_s,
            exposed_s=self._exposed_s,
            collectives=traffic.collectives,
            alpha=probe.alpha_hat if probe else None,
            residual=probe.residual_ratio if probe else None,
            drift=self._drift,
        )

    def enter(self, key: Hashable, name: str, once: str) -> None:
        """Note that the gradients ``key`` are about to be exchanged; opens the step where nobody else does.

        Raises:
            CommError: they have been in this step already, and steps are given by :meth:`begin_step`.
        """
        self.check()
        if self._step_is_given and key in self._seen:
            raise CommError(f"gradients of {name} were averaged twice in step {self.step}", once)
        if not self._step_is_given and (self._between_steps or key in self._seen):
            self._open(self.step + 1)
        self._seen.add(key)

    def at_step(self, step: int) -> None:
        """Open ``step`` unless it is open."""
        self.check()
        if step != self.step or self._between_steps:
            self._open(step)

    def exchange(self, label: str, items: Sequence[ShardItem]) -> None:
        """Exchange ``items``; a collective call, in the same order on every rank.

        Raises:
            CommError: a peer died or the limit passed; every later call raises it too.
            NonFiniteGradient: on every rank alike.
        """
        self.check()
        started = time.perf_counter()

        def buffer(use: str, nbytes: int) -> Tensor:
            return self._buffer(f"{label}/{use}", nbytes)

        whole = self.step <= self.config.warmup_steps
        self._run(
            lambda: ShardExchange(
                label, items, self._communicator, self._feedback, self._direction, whole, buffer, self._probe
            )
        )
        self._numel += sum(part.numel() for item in items for part in item.parts)
        self._exposed_s += time.perf_counter() - started

    def _run(self, make: Callable[[], ShardExchange]) -> None:
        try:
            with self._timed_codec(self._lane.mark()):
                exchange = make()
                exchange.encode()
            self._settle()
            self._communicator.submit(exchange.move).result()
            with self._timed_codec():
                exchange.decode()
            self._settle()
        except BaseException as error:
            self._failure = error
            raise

    def _resync(self, feedback: Feedback) -> None:
        """Exact means in the place of the running ones that rounding lets drift; a collective call."""
        worst = 0.0
        for shards in self.shards.values():
            own = tracked(feedback, shards.local) if shards.local else None
            if own is None:
                continue
            plain = replace(shards, compress=False, local=None, owned=None, moments={})
            flat = own.reshape(-1)
            mean = torch.empty(numel_of(shards.cuts[shards.mine].shape), dtype=shards.dtype, device=shards.device)
            item = ShardItem(plain, [flat[cut.start : cut.stop] for cut in shards.cuts], mean)
            self._run(partial(self._plain_exchange, f"resync of {shards.name}", item))
            if mean.numel():
                held = shards.held(feedback)
                worst = max(worst, resync(held, mean.view(shards.cuts[shards.mine].shape)))
        self._drift = worst

    def _plain_exchange(self, label: str, item: ShardItem) -> ShardExchange:
        def buffer(use: str, nbytes: int) -> Tensor:
            return torch.empty(nbytes, dtype=torch.uint8, device=self._lane.device)

        return ShardExchange(label, [item], self._communicator, None, None, True, buffer)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Live tensors, as :meth:`GradientReducer.state_dict`; nothing is the same on every rank.

        Raises:
            CommError: an exchange has failed.
        """
        self.check()
        local: dict[str, dict[str, Tensor]] = {}
        for name, shards in self.shards.items():
            slots = dict(shards.local or {})
            slots |= {_owned(slot): tensor for slot, tensor in (shards.owned or {}).items()}
            for index, moments in shards.moments.items():
                slots |= {of_slice(_moment(slot), index): tensor for slot, tensor in moments.items()}
            if slots:
                local[name] = slots
        return {"local": local, "replicated": {}, "meta": self._meta()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over a copy of the state, all of it or (on an error) none.

        Raises:
            CommStateMismatch: names the setting, parameter, slot, shape or type that does not fit.
            CommError: an exchange has failed.
        """
        self.check()
        meta, expected = state["meta"], self._meta()
        for key in ("version", "layout", "compressor", "feedback", "target", "world_size"):
            if key == "world_size" and self._feedback is None and self._direction is None:
                continue
            if meta.get(key) != expected[key]:
                raise CommStateMismatch(
                    f"error-feedback state was saved with {key} = {meta.get(key)!r}, this run has {expected[key]!r}",
                    f"continue with {key} = {meta.get(key)!r}, or start a new run",
                )
        for name in state["local"]:
            if name not in self.shards or not (self.shards[name].compress or self._direction is not None):
                raise CommStateMismatch(f"error-feedback state of {name!r}: no such compressed parameter", _FIX)
        found = {name: self._read(shards, state["local"].get(name)) for name, shards in self.shards.items()}
        for name, shards in self.shards.items():
            shards.local, shards.owned, shards.moments = found[name]
        self.step = int(meta["step"])
        self._between_steps = True

    def close(self) -> None:
        """End the thread and drop the process group. Not a collective call; closing twice is harmless.

        Raises:
            CommError: a collective did not end within the limit.
        """
        self._closed = True
        self._communicator.close()

    def check(self) -> None:
        """Raise the error there was."""
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise CommError("the reducer was closed")

    def _open(self, step: int) -> None:
        self.step = step
        self._seen = set()
        self._between_steps = False
        self._communicator.take_totals()
        self._numel = 0
        self._codec_s = self._exposed_s = 0.0
        every = self.config.probe_every_steps
        self._probe = Probe() if every and step % every == 0 else None
        self._drift = None
        every, feedback = self.config.resync_every_steps, self._feedback
        if every and step % every == 0 and feedback is not None and feedback.replicated_slots:
            self._resync(feedback)

    def _meta(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "layout": self._layout,
            "compressor": self.config.compressor,
            "feedback": self.config.feedback if self._feedback else "none",
            "target": self.config.target,
            "world_size": self.world_size,
            "step": self.step,
        }

    def _read(
        self, shards: Shards, saved: Mapping[str, Tensor] | None
    ) -> tuple[Slots | None, Slots | None, dict[int, Slots]]:
        """(local, owned, moments) of one parameter, copied."""
        if saved is None:
            # Before its first gradient a parameter has no state, and one without gradients never gets any.
            return None, None, {}
        local, owned, moments = self._expected(shards)
        expected = local | owned
        for index, forms in moments.items():
            expected |= {of_slice(_moment(slot), index): form for slot, form in forms.items()}
        if set(saved) != set(expected):
            raise CommStateMismatch(
                f"error-feedback state of {shards.name!r} has {sorted(saved)}, expected {sorted(expected)}", _FIX
            )
        copies: Slots = {}
        for slot, (form, dtype) in expected.items():
            tensor = saved[slot]
            if tuple(tensor.shape) != form or tensor.dtype != dtype:
                raise CommStateMismatch(
                    f"error-feedback state {slot!r} of {shards.name!r} is {tuple(tensor.shape)} {tensor.dtype}, "
                    f"expected {form} {dtype}",
                    _FIX,
                )
            copies[slot] = tensor.detach().to(shards.device, copy=True, memory_format=torch.contiguous_format)
        held = {slot.removeprefix(_owned("")): copies[slot] for slot in owned}
        moved = {index: {s: copies[of_slice(_moment(s), index)] for s in forms} for index, forms in moments.items()}
        return {slot: copies[slot] for slot in local} if local else None, held or None, moved

    def _expected(self, shards: Shards) -> tuple[Forms, Forms, dict[int, Forms]]:
        """Names, shapes and types of the local, owned and, slice by slice, the direction's slots."""
        feedback, dtype, cpu = self._feedback, shards.dtype, torch.device("cpu")
        local: Forms = {}
        owned: Forms = {}
        moments: dict[int, Forms] = {}
        tracked = feedback is not None and shards.compress
        if tracked:
            assert feedback is not None
            local = dict.fromkeys(feedback.own_slots, (shards.shape, dtype))
            for index, cut in enumerate(shards.cuts):
                apart = _forms(feedback.new_apart(cut.shape, dtype, cpu))
                local |= {of_slice(slot, index): form for slot, form in apart.items()}
            mine = shards.cuts[shards.mine].shape
            if numel_of(mine):
                owned = {_owned(slot): (mine, dtype) for slot in feedback.replicated_slots}
        if self._direction is not None:
            for index, cut in enumerate(shards.cuts):
                if numel_of(cut.shape) and (tracked or index == shards.mine):
                    moments[index] = _forms(self._direction.start(torch.zeros(cut.shape, dtype=dtype)))
        return local, owned, moments

    def _settle(self) -> None:
        """On CUDA: what was queued is done before another thread, or stream, reads it."""
        if self._lane.device.type == "cuda":
            torch.cuda.synchronize(self._lane.device)

    @contextmanager
    def _timed_codec(self, after: torch.cuda.Event | None = None) -> Iterator[None]:
        started = time.perf_counter()
        with torch.no_grad(), self._lane.work(after):
            yield
        self._codec_s += time.perf_counter() - started

    def _buffer(self, use: str, nbytes: int) -> Tensor:
        """A uint8 tensor, kept for the next step except in a warm-up, whose buffers are as large as the model."""
        held = self._buffers.get(use)
        if held is None or held.numel() < nbytes:
            held = torch.empty(nbytes, dtype=torch.uint8, device=self._lane.device)
            if self._feedback is None or self.step > max(self.config.warmup_steps, 1):
                self._buffers[use] = held
        return held[:nbytes]


def cannot_reshard(what: str, saved: int, ranks: int) -> CommStateMismatch:
    """The refusal of state that another number of ranks saved."""
    return CommStateMismatch(
        f"error-feedback state of {saved} ranks cannot be redistributed over {ranks} ranks: {what} cuts gradients into "
        "shards",
        f"continue with {saved} ranks, or leave the error-feedback state out, which begins anew",
    )


def _forms(slots: Slots) -> Forms:
    return {slot: (tuple(tensor.shape), tensor.dtype) for slot, tensor in slots.items()}


def _owned(slot: str) -> str:
    return f"owned_{slot}"


def _moment(slot: str) -> str:
    return f"adam_{slot}"
