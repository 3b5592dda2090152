"""The watch on a model's numbers, as a training loop uses it."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from outlast.diagnostics.live.recorder import Recorder
from outlast.diagnostics.numerics.config import NumericsConfig
from outlast.diagnostics.numerics.digests import Digests, ignored_by_ddp, replicated, shares_its_state
from outlast.diagnostics.numerics.drift import DriftWatch
from outlast.diagnostics.numerics.events import NotFinite, NumericsEvent
from outlast.diagnostics.numerics.findings import Found, Joined, joined
from outlast.diagnostics.numerics.forward import ForwardMemory, Rerun
from outlast.diagnostics.numerics.gradients import bad_gradients, norm_of
from outlast.diagnostics.numerics.model_parts import bare, sharing_of
from outlast.diagnostics.numerics.peers import Peers
from outlast.diagnostics.numerics.replicas import compare, difference_event
from outlast.diagnostics.numerics.spikes import Spikes, spike_event
from outlast.diagnostics.numerics.to_host import OnItsWay
from outlast.errors import CommError, OutlastError, ReplicasDiffer, TrainingDiverged

_FIX_REPLICAS = (
    "go on from the newest checkpoint, which verifies; test the node of a rank that is named again: outlast doctor"
)
_LOG = logging.getLogger("outlast")
_FIX = "look at the data of that step; lower the learning rate, lengthen warm-up, or go on from an earlier checkpoint"
_FIX_TRANSIENT = "go on from the newest checkpoint; if it comes again on the same rank, test that node: outlast doctor"


class NumericsWatch:
    """Watches the numbers of one model, in any loop; every rank makes one, with the same arguments.

    ::

        watch = NumericsWatch(ddp, optimizer)
        for step in range(1, 1001):
            value = loss(ddp, step)
            value.backward()
            optimizer.step()  # raises TrainingDiverged before the update, if a gradient is not finite
            optimizer.zero_grad()
            watch.end_step(loss=value)
        watch.close()

    Making one is collective over the ranks that train the model together: those of DDP or FSDP2 around it, or
    ``ranks``. So is what it does when it finds something: with DDP and FSDP2 all ranks have the same averages, and find
    it in the same step. What is not watched, and why, is in :attr:`not_watched`.

    Args:
        model: as the loop calls it: in DDP, sharded with ``fully_shard``, compiled, or bare.
        optimizer: whose updates are watched, and whose state replicas have in common; None: as if it had none.
        config: see :class:`NumericsConfig`.
        on_event: is given what is found; None: it is logged as a warning.
        ranks: of the default process group, that average this model's gradients, where neither DDP nor FSDP2 says so.
        recorder: learns of collectives.
        follows_updates: whether each update of the optimizer looks at the gradients before. If not, the loop does so,
            by :meth:`check_gradients`, or calls :meth:`explained` after an error of its own.

    Raises:
        CommError: the ranks' process group cannot be made.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        config: NumericsConfig | None = None,
        *,
        on_event: Callable[[NumericsEvent], None] | None = None,
        ranks: Sequence[int] | None = None,
        recorder: Recorder | None = None,
        follows_updates: bool = True,
    ) -> None:
        self.config = config or NumericsConfig()
        self._model = bare(model)
        self._optimizer = optimizer
        self._emit = on_event if on_event is not None else _log_event
        self._parameters = [one for one in self._model.parameters() if one.requires_grad]
        self._sharing = sharing_of(model, None if ranks is None else tuple(ranks))
        self._rank = self._sharing.ranks[0] if len(self._sharing.ranks) == 1 else torch.distributed.get_rank()
        self._is_first = self._rank == self._sharing.ranks[0]
        self._peers = Peers(self._sharing.ranks, self.config.peers_timeout_s, recorder)
        self.not_watched: list[str] = []
        """What these settings ask for and cannot be done here, each with the reason."""
        self._step = 1  # that the loop is in
        self._norm: Tensor | None = None  # of the step's gradients, on their device
        self._late: tuple[int, OnItsWay] | None = None  # a step, and its norm, not looked at yet
        self._digests = Digests()
        self._equal_at: int | None = None
        self._compared_at: int | None = None
        self._told_difference = False
        self._state_is_shared = shares_its_state(optimizer)
        self._replicas = self._find_replicas(recorder) if self.config.replicas_every_steps else None
        self._watched: deque[tuple[int, str, OnItsWay]] = deque()  # numbers on their way to the host
        self._spikes: dict[str, Spikes] = {}
        self._loss_is_finite = True
        self._drift: DriftWatch | None = None
        if self.config.drift_every_steps and self._is_first:  # replicas have the same weights, and would tell the same
            self._drift = DriftWatch(model, optimizer, self.config, lambda: self._step, self._note)
        self._on_device = any(one.device.type != "cpu" for one in self._parameters)
        self._hooks: list[Any] = []
        off = self.config.not_finite == "off"
        self._memory = ForwardMemory(model, 0 if off else self.config.rerun_batches)
        if optimizer is not None and follows_updates:
            self._hooks.append(optimizer.register_step_pre_hook(self._before_update))
            self._hooks.append(optimizer.register_step_post_hook(self._after_update))

    def _find_replicas(self, recorder: Recorder | None) -> Peers | None:
        """The ranks that must hold what this one holds; None, and why, if there are none."""
        sharing = self._sharing
        if sharing.why_none:
            if len(sharing.ranks) > 1 or "nothing around" in sharing.why_none:
                self._note(f"replicas are not compared: {sharing.why_none}")
            return None
        if ignored := sorted(ignored_by_ddp(self._model)):
            more = f" and {len(ignored) - 1} more" if len(ignored) > 1 else ""
            self._note(f"not compared: {ignored[0]}{more}, which DDP was told to leave to each rank")
        if self._state_is_shared:
            self._note("optimizer state is not compared: each rank keeps a part of it, and none has what another has")
        if sharing.replicas == sharing.ranks:
            return self._peers
        return Peers(sharing.replicas, self.config.peers_timeout_s, recorder)

    @property
    def step(self) -> int:
        """The number of the step that the loop is in; the first is 1 unless :meth:`begin_step` says otherwise."""
        return self._step

    def begin_step(self, step: int) -> None:
        """The loop's own number of the step that begins, for events and errors."""
        self._step = step

    @property
    def remembers(self) -> bool:
        """Whether the step's forward was seen, so that it can be run again."""
        return self._memory.holds_any

    def end_step(self, loss: float | Tensor | None = None, norm: float | None = None, what: str = "gradient") -> None:
        """The step has ended: what it changes is changed. Call it on all ranks, once for each step. Collective where
        digests are compared.

        Args:
            loss: of this rank. Of a tensor on a device the host reads it a step later, and does not wait.
            norm: of what was averaged, before clipping; None takes what the watch itself has seen.
            what: was averaged: ``gradient``, or ``update``.
        """
        self._memory.forget()
        step, self._step = self._step, self._step + 1
        if self.config.spikes:
            if norm is None and self._norm is not None and not self._sharing.is_sharded:
                self._watched.append((step, f"{what} norm", OnItsWay(self._norm)))
            elif norm is not None:
                self._look_at_value(step, f"{what} norm", norm)
            if isinstance(loss, Tensor):
                self._watched.append((step, "loss", OnItsWay(loss.detach().float().reshape(()))))
            elif loss is not None:
                self._look_at_value(step, "loss", loss)
            self._look_at_watched(before=step if self._on_device else step + 1)
        self._norm = None
        for told in self._drift.look(before=step if self._on_device else step + 1) if self._drift is not None else ():
            self._emit(told)
        self.compare_if_due(step)

    def compare_if_due(self, step: int) -> None:
        """After the update of ``step``, what :meth:`compare_replicas` does, if it is due and was not done. Collective.

        :meth:`end_step` does it; a loop that saves before that calls it earlier.
        """
        every = self.config.replicas_every_steps
        if self._replicas is not None and every and step % every == 0 and self._compared_at != step:
            self.compare_replicas(step)

    def compare_replicas(self, step: int | None = None) -> bool:
        """Compare digests of parameters and optimizer state with the other replicas now; between updates. Collective.

        Args:
            step: after which it is; None: the last one that has ended.

        Returns:
            Whether they are the same; True if there are no others.

        Raises:
            ReplicasDiffer: they are not, and ``replicas_action`` is ``stop``.
            CommError: a peer is lost, or does not come within ``peers_timeout_s``.
        """
        step = self._step - 1 if step is None else step
        self._compared_at = step
        if self._replicas is None:
            return True
        tensors = replicated(self._model, None if self._state_is_shared else self._optimizer)
        found = compare(dict(zip(tensors, self._digests.of(list(tensors.values())), strict=True)), self._replicas)
        if found is None:
            self._equal_at, self._told_difference = step, False
            return True
        if not self._told_difference:
            kept = (
                "parameters and optimizer state" if len(tensors) > len(list(self._model.parameters())) else "parameters"
            )
            event = difference_event(step, found, self._equal_at, f"{len(tensors)} tensors: {kept}")
            self._told_difference = True
            self._emit(event)
            if self.config.replicas_action == "stop":
                raise ReplicasDiffer(f"step {step}: {event.told}", _FIX_REPLICAS)
        return False

    def _look_at_watched(self, before: int) -> None:
        """Look at what has reached the host: of a device, what was sent a step before."""
        while self._watched and self._watched[0][0] < before:
            step, name, value = self._watched.popleft()
            self._look_at_value(step, name, value.value())

    def _look_at_value(self, step: int, name: str, value: float) -> None:
        config, is_loss = self.config, name == "loss"
        if is_loss and config.not_finite != "off":
            self._look_at_loss(step, value)
        if name not in self._spikes:
            least = config.spike_loss_share if is_loss else config.spike_norm_factor - 1
            self._spikes[name] = Spikes(config.spike_window, config.spike_sigmas, least, in_logs=not is_loss)
        found = self._spikes[name].look(step, value)
        if found is not None and (is_loss or self._is_first):  # a norm is the same on all ranks
            self._emit(spike_event(step, name, found))

    def _look_at_loss(self, step: int, loss: float) -> None:
        """Once, until it is finite again: gradients that are not finite have ended the run before this."""
        was_finite, self._loss_is_finite = self._loss_is_finite, math.isfinite(loss)
        if was_finite and not self._loss_is_finite:
            told = f"the loss of rank {self._rank} is {loss}, and its gradients did not stop the update"
            self._emit(NotFinite(step=step, ranks=(self._rank,), module="", parameter="", transient=False, told=told))

    def after_update(self) -> None:
        """The gradients have been used: a step that is sampled looks at them. Each update that is followed does it."""
        self._memory.forget()
        if self._drift is not None:
            self._drift.after_update()

    def check_gradients(self) -> None:
        """Look at the gradients now: before they are clipped, which makes all of them NaN if one is. Collective if
        something is found.

        Raises:
            TrainingDiverged: one is not finite; nothing has been updated.
        """
        found = norm_of(self._parameters)
        self._norm = found
        if found is None or self.config.not_finite == "off":
            return
        if self.config.not_finite == "after_update":
            late, self._late = self._late, (self._step, OnItsWay(found))
            if late is not None:
                self._look(late[0], late[1].value())
            return
        self._look(self._step, float(found))

    def explained(self, error: OutlastError, step: int | None = None) -> OutlastError:
        """An error of the same class that also says where in the model, and on which rank, values are not finite.

        Its event is written. Collective: for an error that all ranks raise alike.

        Args:
            error: that said that something is not finite.
            step: in which; None: the one that the loop is in.
        """
        if self.config.not_finite == "off":
            return error
        found = self._tell(self._step if step is None else step, self._memory.rerun(backward=self._can_go_backward))
        return type(error)(f"{error.what}; {found.told}", error.fix)

    def close(self) -> None:
        """Take all hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._memory.close()
        self._peers.close()
        if self._replicas is not None:
            self._replicas.close()
        if self._drift is not None:
            self._drift.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _note(self, line: str) -> None:
        self.not_watched.append(line)
        if self._is_first:
            _LOG.info("numerics: %s", line)

    def _before_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if getattr(optimizer, "found_inf", None) is not None:
            return  # a gradient scaler searches for its scale, and the optimizer leaves out an update that overflowed
        if len(args) > 1 or kwargs.get("closure") is not None:  # the optimizer itself is the first
            return  # gradients are computed inside
        self.check_gradients()

    def _after_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.after_update()

    def _look(self, step: int, norm: float) -> None:
        if self._sharing.is_sharded:  # no rank has the whole norm, and all must find the same
            rows = self._peers.gather([int(math.isfinite(norm))], "whether gradients are finite")
            norm = norm if all(row[0] for row in rows) else math.nan
        if math.isfinite(norm):
            return
        same_step = step == self._step
        found = self._tell(step, self._memory.rerun(backward=self._can_go_backward) if same_step else Rerun("not_seen"))
        late = "" if same_step else "which the parameters have been updated with"
        raise TrainingDiverged(
            f"step {step}: the gradient norm is {norm}{f', {late}' if late else '; the parameters were not updated'}; "
            f"{found.told}",
            _FIX_TRANSIENT if found.transient else _FIX,
        )

    @property
    def _can_go_backward(self) -> bool:
        """Whether gradients of this rank alone can be computed: those of shards are computed by all ranks."""
        return not self._sharing.is_sharded

    def _tell(self, step: int, rerun: Rerun) -> Joined:
        """Join what was found here and on the other ranks, and write the event. Collective."""
        mine = Found(rerun, bad_gradients([one.grad for one in self._parameters]))
        ranks, asked = self._sharing.ranks, ""
        try:
            rows = self._peers.gather(mine.numbers(), "values that are not finite")
            by_rank = {rank: Found.of(row) for rank, row in zip(ranks, rows, strict=True)}
        except CommError as error:
            by_rank, asked = {}, f"the other ranks could not be asked ({error.what})"
        found = joined(by_rank | {self._rank: mine}, self._model, asked)
        self._emit(
            NotFinite(
                step=step,
                ranks=found.ranks,
                module=found.module,
                parameter=found.parameter,
                transient=found.transient,
                told=found.told,
            )
        )
        return found


def _log_event(event: NumericsEvent) -> None:
    _LOG.warning("step %d: %s", event.step, event.told)
