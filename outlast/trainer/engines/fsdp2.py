"""PyTorch's FSDP2: parameters, gradients and optimizer state are sharded, or copies of the shards are kept (HSDP)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from outlast.checkpoint import check_like
from outlast.comm import CollectiveObserver, Reducer, attach
from outlast.comm.direction import Adam
from outlast.errors import ConfigError, StateMismatch
from outlast.session.buffers import of_rank_0
from outlast.trainer.batches import Batch, to_device
from outlast.trainer.blocks import blocks_of
from outlast.trainer.config import Config
from outlast.trainer.engines.base import EAGER, UNMEASURED, EngineState, State, UpdateStats
from outlast.trainer.engines.training import (
    apply_update,
    check_optimizer_names,
    clip,
    load_comm,
    load_tensors,
    own_buffers,
    recorded,
)
from outlast.trainer.optim import load_optimizer_state, load_scheduler_state, optimizer_state, scheduler_state
from outlast.trainer.parts import build_loss, make_optimizer, make_scheduler


class FSDP2Engine:
    """``fully_shard`` on each block of the model, then on the model; compressed gradients are reduced by outlast.

    Dense gradients are reduced by FSDP2 itself.

    Args:
        model: on its device, with the same weights on every rank.
        config: all settings.
        device: where ``model`` is.
        observer: records every exchange of gradients, and each forward and backward as a whole, whose other collectives
            are FSDP2's own.

    Raises:
        ConfigError: ``fsdp.mesh`` does not have as many ranks as there are, or ``fsdp.blocks`` names no module.
        CommError: what ``[comm]`` asks for cannot be done with FSDP2.
    """

    def __init__(
        self, model: nn.Module, config: Config, device: torch.device, observer: CollectiveObserver | None = None
    ) -> None:
        self.model = model
        self.device = device
        self._clip_norm = config.clip_norm or math.inf
        self._bf16 = config.trainer.precision == "bf16"
        self._observer = observer
        mesh = _mesh(config.fsdp.mesh, device)
        for part in (*blocks_of(model, config.fsdp.blocks), model):
            fully_shard(part, mesh=mesh, reshard_after_forward=config.fsdp.reshard_after_forward)
        assert isinstance(model, FSDPModule)
        self._sharded: FSDPModule = model
        self._averages_updates = config.comm.target == "update"
        self._reducer: Reducer | None = None
        if config.comm.compressor != "dense" or self._averages_updates:
            optim = config.optim
            direction = Adam(config.beta1, optim.beta2, optim.eps, optim.clip_rms) if self._averages_updates else None
            self._reducer = attach(model, config.comm, observer=observer, direction=direction)
        self._optimizer = make_optimizer(model, config)
        self._scheduler = make_scheduler(self._optimizer, config)
        self._loss_of = build_loss(config)
        self._reduced = UNMEASURED

    @property
    def optimizer(self) -> Optimizer:
        """See :class:`Engine`."""
        return self._optimizer

    def forward_backward(self, step: int, batches: Sequence[Batch]) -> float:
        """See :class:`Engine`; only the last micro-batch's backward pass reduces gradients."""
        self._optimizer.zero_grad()
        if self._reducer is not None:
            self._reducer.begin_step(step)
        total = torch.zeros((), device=self.device)
        with recorded(self._observer, "fsdp2"):
            for index, batch in enumerate(batches, 1):
                self._sharded.set_requires_gradient_sync(index == len(batches))
                loss = self._loss(batch) / len(batches)
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        if self._reducer is not None:
            self._reduced = self._reducer.end_step()
        return float(total)

    def update(self, step: int) -> UpdateStats:
        """See :class:`Engine`. Collective: the norm is that of all shards.

        Raises:
            TrainingDiverged: the norm is NaN or infinite; parameters and optimizer are as before.
        """
        what = "update" if self._averages_updates else "gradient"
        norm = clip(step, self.model.parameters(), self._clip_norm, what)
        return apply_update(norm, self._optimizer, self._scheduler, self._reduced, of_updates=self._averages_updates)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """See :class:`Engine`. Collective for each batch: parameters are gathered."""
        self.model.eval()
        losses = torch.stack([self._loss(batch) for batch in batches])
        self.model.train()
        return losses.mean()

    def state(self) -> EngineState:
        """See :class:`Engine`. Parameters and their optimizer state are DTensors, which each rank saves its part of."""
        buffers = dict(self.model.named_buffers())
        replicated: State = {
            "model": dict(self.model.named_parameters()) | of_rank_0(buffers, self._observer),
            "optimizer": optimizer_state(self.model, self._optimizer),
            "scheduler": scheduler_state(self._scheduler),
        }
        local: State = {"buffers": buffers}
        if self._reducer is not None:
            comm = self._reducer.checkpoint_parts()
            replicated |= comm.replicated
            local |= comm.local
        return EngineState(replicated, {key: value for key, value in local.items() if value}, EAGER)

    def like(self) -> State:
        """See :class:`Engine`: parameters, and optimizer state as an update makes it."""
        model = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        if self._averages_updates:  # plain SGD has no state
            return {"model": model, "optimizer": {}}
        made = not self._optimizer.state
        if made:
            _make_state(self._optimizer)
        optimizer = optimizer_state(self.model, self._optimizer)
        if made:
            self._optimizer.state.clear()  # a run that begins anew begins without any
        return {"model": model, "optimizer": optimizer}

    def load(self, replicated: State, read_local: Callable[[int], State], ranks: int) -> None:
        """See :class:`Engine`. Error-feedback state of another number of ranks is refused: it is sharded."""
        running = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        check_like(replicated["model"], running)
        check_optimizer_names(replicated["optimizer"], running)
        if self._reducer is not None:
            comm: Any = replicated.get("comm")
            if comm is None:
                raise StateMismatch(
                    "the checkpoint was saved with dense gradients, and has no state of error feedback for FSDP2",
                    'go on with comm.compressor = "dense", or begin a new run with run.start_from',
                )
            load_comm(self._reducer, comm, read_local, ranks)
        rank = dist.get_rank()
        load_tensors(self.model, own_buffers(replicated["model"], read_local(rank) if rank < ranks else {}))
        load_optimizer_state(self.model, self._optimizer, replicated["optimizer"])
        load_scheduler_state(self._scheduler, replicated["scheduler"])

    def close(self) -> None:
        """See :class:`Engine`."""
        if self._reducer is not None:
            self._reducer.close()

    def _loss(self, batch: Batch) -> Tensor:
        batch = to_device(batch, self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            return self._loss_of(self.model, batch)


def _mesh(sizes: Sequence[int], device: torch.device) -> DeviceMesh:
    ranks = dist.get_world_size()
    if not sizes:
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    copies, shards = sizes
    if copies * shards != ranks:
        raise ConfigError(
            f"fsdp.mesh = [{copies}, {shards}] is of {copies * shards} ranks, and there are {ranks}",
            f"choose two numbers whose product is {ranks}, or leave fsdp.mesh out",
        )
    return init_device_mesh(device.type, (copies, shards), mesh_dim_names=("copy", "shard"))


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer that was never stepped make its state, without changing a parameter."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
