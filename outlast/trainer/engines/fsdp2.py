"""PyTorch's FSDP2: parameters, gradients and optimizer state are sharded, or copies of the shards are kept (HSDP)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from outlast.comm import CollectiveObserver, Reducer, attach
from outlast.errors import ConfigError
from outlast.trainer.blocks import blocks_of
from outlast.trainer.config import Config
from outlast.trainer.engines.base import State
from outlast.trainer.engines.training import ModuleEngine, adam_direction, recorded
from outlast.trainer.optim import optimizer_state


class FSDP2Engine(ModuleEngine):
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
        mesh = _mesh(config.fsdp.mesh, device)
        for part in (*blocks_of(model, config.fsdp.blocks), model):
            fully_shard(part, mesh=mesh, reshard_after_forward=config.fsdp.reshard_after_forward)
        assert isinstance(model, FSDPModule)
        self._sharded: FSDPModule = model
        reducer: Reducer | None = None
        if config.comm.target == "update":
            reducer = attach(model, config.comm, observer=observer, direction=adam_direction(config))
        elif config.comm.compressor != "dense":
            reducer = attach(model, config.comm, observer=observer)
        super().__init__(model, config, device, observer, reducer)

    def _reducing(self, *, last: bool) -> AbstractContextManager[None]:
        self._sharded.set_requires_gradient_sync(last)
        return nullcontext()

    def _recorded(self) -> AbstractContextManager[None]:
        return recorded(self._observer, "fsdp2")

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
