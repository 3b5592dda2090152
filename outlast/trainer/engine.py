"""The engine: the interface between the training loop and DDP, which replicates the model and updates it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from outlast.checkpoint import check_like
from outlast.comm import (
    Choice,
    CollectiveObserver,
    GradientReducer,
    ReduceStats,
)
from outlast.comm.direction import (
    Adam,
)
from outlast.errors import StateMismatch, TrainingDiverged
from outlast.trainer.config import Config
from outlast.trainer.optim import (
    build_optimizer,
    build_scheduler,
    load_optimizer_state,
    load_scheduler_state,
    optimizer_state,
)

Batch = tuple[Tensor, Tensor]
State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class EngineState:
    """Everything an engine needs to resume bit-identically. The tensors are the live ones, not copies.

    ``eager`` names the top-level keys whose tensors the next backward pass changes; the others change in the update.
    """

    replicated: State
    local: State
    eager: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStats:
    """One update of the parameters: its learning rate, and the norm of what the ranks averaged, before clipping."""

    lr: float
    grad_norm: float | None = None
    """Norm of the averaged gradient; None where updates are averaged."""
    update_norm: float | None = None
    """Norm of the averaged update, Adam's direction; None where gradients are averaged."""


class Engine(Protocol):
    """Owns the model, optimizer, scheduler and gradient exchange.

    A step is ``forward_backward``, then ``update``. All ranks call the same methods in the same order.
    ``forward_backward`` is collective: when a peer fails it raises within the timeout of ``[comm]``, and the engine
    cannot be used again.
    """

    model: nn.Module

    def forward_backward(self, step: int, batches: Sequence[Batch]) -> tuple[float, ReduceStats]:
        """Mean loss of this rank's micro-batches, and the cost of the exchange; sets ``.grad`` to averages."""
        ...

    def update(self, step: int) -> UpdateStats:
        """Clip, update parameters, advance the schedule."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """Mean loss of this rank's batches, a scalar on the engine's device; no state changes."""
        ...

    def state(self) -> EngineState:
        """The state to save."""
        ...

    def load(self, replicated: State, read_local: Callable[[int], State], ranks: int) -> None:
        """Load what :meth:`state` returned on ``ranks`` ranks, which may differ from the world size.

        ``read_local`` returns the local state of one of them.

        Raises:
            StateMismatch: names what does not match; the model is unchanged.
        """
        ...

    def close(self) -> None:
        """Stop background threads."""
        ...


class DDPEngine:
    """PyTorch's DistributedDataParallel with outlast's reducer as its communication hook.

    Args:
        model: on its device; every rank must hold the same initial weights (DDP broadcasts rank 0's).
        config: all settings.
        device: where ``model`` is.
        observer: records every collective that reduces gradients.
        on_choice: called with what ``comm.compressor = "auto"`` became.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        device: torch.device,
        observer: CollectiveObserver | None = None,
        on_choice: Callable[[Choice], None] | None = None,
    ) -> None:
        self.model = model
        self.device = device
        self._clip_norm = config.clip_norm or math.inf
        self._bf16 = config.trainer.precision == "bf16"
        self._ddp = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            bucket_cap_mb=config.trainer.bucket_mb,
            gradient_as_bucket_view=True,
        )
        optim = config.optim
        self._reducer = GradientReducer(
            model.named_parameters(),
            config.comm,
            observer=observer,
            direction=Adam(config.beta1, optim.beta2, optim.eps, optim.clip_rms),
            dense_direction=Adam(0.9 if optim.beta1 is None else optim.beta1, optim.beta2, optim.eps, optim.clip_rms),
            on_choice=on_choice,
        )
        self._reducer.attach(self._ddp)
        self._averages_updates = config.comm.target == "update"
        self._optimizer = build_optimizer(model, optim, directed=self._averages_updates)
        self._scheduler = build_scheduler(self._optimizer, config.optim, config.trainer.steps)

    def forward_backward(self, step: int, batches: Sequence[Batch]) -> tuple[float, ReduceStats]:
        """See :class:`Engine`; only the last micro-batch's backward pass communicates."""
        self._optimizer.zero_grad()
        self._reducer.begin_step(step)
        total = torch.zeros((), device=self.device)
        for index, batch in enumerate(batches, 1):
            last = index == len(batches)
            with contextlib.nullcontext() if last else self._ddp.no_sync():
                loss = self._loss(self._ddp, batch) / len(batches)
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        stats = self._reducer.end_step()
        return float(total), stats

    def update(self, step: int) -> UpdateStats:
        """See :class:`Engine`.

        Raises:
            TrainingDiverged: the norm is NaN or infinite; parameters and optimizer are as before.
        """
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm))
        if not math.isfinite(norm):
            raise TrainingDiverged(
                f"step {step}: the {'update' if self._averages_updates else 'gradient'} norm is {norm}; "
                "the parameters were not updated",
                "lower optim.lr, lengthen optim.warmup_steps, or resume from an earlier step with --resume STEP",
            )
        lr = float(self._scheduler.get_last_lr()[0])
        self._optimizer.step()
        self._scheduler.step()
        if self._averages_updates:
            return UpdateStats(lr=lr, update_norm=norm)
        return UpdateStats(lr=lr, grad_norm=norm)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """See :class:`Engine`."""
        self.model.eval()
        losses = torch.stack([self._loss(self.model, batch) for batch in batches])
        self.model.train()
        return losses.mean()

    def state(self) -> EngineState:
        """See :class:`Engine`."""
        comm = self._reducer.state_dict()
        replicated = {
            "model": dict(self.model.named_parameters()) | dict(self.model.named_buffers()),
            "optimizer": optimizer_state(self.model, self._optimizer),
            "scheduler": self._scheduler.state_dict(),
            "comm": {"aggregate": comm["replicated"], "meta": comm["meta"]},
        }
        return EngineState(replicated, {"comm": comm["local"]}, frozenset({"comm"}))

    def load(self, replicated: State, read_local: Callable[[int], State], ranks: int) -> None:
        """See :class:`Engine`; error-feedback state is redistributed by :meth:`GradientReducer.load_resharded`."""
        running = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        check_like(replicated["model"], running)
        unknown = sorted(set(replicated["optimizer"]) - set(running))
        if unknown:
            raise StateMismatch(
                f"the checkpoint has optimizer state for parameters that the model lacks: {', '.join(unknown)}"
            )
        comm = replicated["comm"]

        def read(rank: int) -> State:
            return {"replicated": comm["aggregate"], "meta": comm["meta"], "local": read_local(rank)["comm"]}

        self._reducer.load_resharded(read, ranks)
        with torch.no_grad():
            for name, tensor in running.items():
                tensor.copy_(replicated["model"][name])
        load_optimizer_state(self.model, self._optimizer, replicated["optimizer"])
        load_scheduler_state(self._scheduler, replicated["scheduler"])

    def close(self) -> None:
        """See :class:`Engine`."""
        self._reducer.close()

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens, targets = (part.to(self.device) for part in batch)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            loss: Tensor = model(tokens, targets)
        return loss


def build_engine(
    model: nn.Module,
    config: Config,
    device: torch.device,
    observer: CollectiveObserver | None = None,
    on_choice: Callable[[Choice], None] | None = None,
) -> Engine:
    """The engine that ``trainer.engine`` names; so far always ``ddp``."""
    return DDPEngine(model, config, device, observer, on_choice)
