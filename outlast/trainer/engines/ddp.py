"""PyTorch's DistributedDataParallel: the model is replicated."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from outlast.checkpoint import check_like
from outlast.comm import Choice, CollectiveObserver, GradientReducer
from outlast.comm.direction import Adam
from outlast.errors import StateMismatch
from outlast.session.buffers import of_rank_0
from outlast.trainer.batches import Batch, to_device
from outlast.trainer.config import Config
from outlast.trainer.engines.base import EAGER, EngineState, State, UpdateStats
from outlast.trainer.engines.training import (
    apply_update,
    check_optimizer_names,
    clip,
    load_comm,
    load_tensors,
    own_buffers,
)
from outlast.trainer.optim import load_optimizer_state, load_scheduler_state, optimizer_state, scheduler_state
from outlast.trainer.parts import build_loss, make_optimizer, make_scheduler


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
        self._observer = observer
        self._clip_norm = config.clip_norm or math.inf
        self._bf16 = config.trainer.precision == "bf16"
        self._ddp = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            bucket_cap_mb=config.trainer.bucket_mb,
            gradient_as_bucket_view=True,
            find_unused_parameters=config.trainer.find_unused_parameters,
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
        self._keeps_state = config.comm.compressor != "dense" or self._averages_updates
        self._optimizer = make_optimizer(model, config)
        self._scheduler = make_scheduler(self._optimizer, config)
        self._loss_of = build_loss(config)

    @property
    def optimizer(self) -> Optimizer:
        """See :class:`Engine`."""
        return self._optimizer

    def forward_backward(self, step: int, batches: Sequence[Batch]) -> float:
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
        self._reduced = self._reducer.end_step()
        return float(total)

    def update(self, step: int) -> UpdateStats:
        """See :class:`Engine`.

        Raises:
            TrainingDiverged: the norm is NaN or infinite; parameters and optimizer are as before.
        """
        what = "update" if self._averages_updates else "gradient"
        norm = clip(step, self.model.parameters(), self._clip_norm, what)
        return apply_update(norm, self._optimizer, self._scheduler, self._reduced, of_updates=self._averages_updates)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """See :class:`Engine`."""
        self.model.eval()
        losses = torch.stack([self._loss(self.model, batch) for batch in batches])
        self.model.train()
        return losses.mean()

    def state(self) -> EngineState:
        """See :class:`Engine`."""
        comm = self._reducer.checkpoint_parts()
        buffers = dict(self.model.named_buffers())
        replicated = {
            "model": dict(self.model.named_parameters()) | of_rank_0(buffers, self._observer),
            "optimizer": optimizer_state(self.model, self._optimizer),
            "scheduler": scheduler_state(self._scheduler),
            **comm.replicated,
        }
        local = comm.local | ({"buffers": buffers} if buffers else {})
        return EngineState(replicated, local, EAGER)

    def like(self) -> None:
        """See :class:`Engine`: every rank has all of the state."""

    def load(self, replicated: State, read_local: Callable[[int], State], ranks: int) -> None:
        """See :class:`Engine`; error-feedback state is redistributed by :meth:`GradientReducer.load_resharded`."""
        if "model" not in replicated:
            raise StateMismatch(
                "the checkpoint was saved under DeepSpeed",
                'resume it with trainer.engine = "deepspeed", or begin a new run',
            )
        running = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        check_like(replicated["model"], running)
        check_optimizer_names(replicated["optimizer"], running)
        if "comm" in replicated:
            load_comm(self._reducer, replicated["comm"], read_local, ranks)
        elif self._keeps_state:
            raise StateMismatch(
                "the checkpoint was saved with dense gradients under FSDP2, and has no state of error feedback",
                'go on with comm.compressor = "dense", or begin a new run with run.start_from',
            )
        rank = dist.get_rank()
        load_tensors(self.model, own_buffers(replicated["model"], read_local(rank) if rank < ranks else {}))
        load_optimizer_state(self.model, self._optimizer, replicated["optimizer"])
        load_scheduler_state(self._scheduler, replicated["scheduler"])

    def close(self) -> None:
        """See :class:`Engine`."""
        self._reducer.close()

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        batch = to_device(batch, self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            return self._loss_of(model, batch)
