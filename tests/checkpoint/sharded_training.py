"""What ranks do that train a sharded model, from one number of ranks to the next."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from outlast.checkpoint import attach
from outlast.events import CheckpointFailed, Event
from tests.checkpoint.sharded import Counting, checkpointer

BATCH = 12


class Model(nn.Module):
    """Rows that ranks cannot share evenly, and fewer of them than ranks."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up = nn.Linear(10, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.down = nn.Linear(hidden, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.tanh(self.norm(self.up(x))))
        return y


@dataclass(frozen=True)
class Sharding:
    """How a job shards its model."""

    mesh: tuple[int, ...]
    """One dimension: FSDP2. Two: HSDP, copies first, or (``tensor_parallel``) FSDP2 over tensor parallelism."""
    tensor_parallel: bool = False
    without_norm: bool = False
    """The norm would need a tensor-parallel plan of its own."""
    hidden: int = 21
    integer_keys: bool = False
    """The optimizer's state as ``optimizer.state_dict()`` has it."""


class Job:
    """One rank of a training."""

    def __init__(self, rank: int, sharding: Sharding) -> None:
        self.rank, self.sharding = rank, sharding
        names = ("copies", "shards") if len(sharding.mesh) == 2 else ("shards",)
        self.mesh = init_device_mesh("cpu", sharding.mesh, mesh_dim_names=names)
        self.model = Model(sharding.hidden)
        if sharding.without_norm:
            del self.model.norm
            self.model.norm = nn.Identity()
        over = self.mesh
        if sharding.tensor_parallel:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(self.model, self.mesh["shards"], plan)
            over = self.mesh["copies"]
        fully_shard(self.model.up, mesh=over)
        fully_shard(self.model, mesh=over)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, betas=(0.8, 0.95))

    def state(self) -> dict[str, Any]:
        """What is saved; the optimizer's state is made if there is none yet."""
        named = get_optimizer_state_dict(self.model, self.optimizer)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.sharding.integer_keys else named,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.sharding.integer_keys:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])

    def train(self, step: int) -> None:
        """One step; the same numbers, whatever the ranks are."""
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 10, generator=generator)
        readers = self.mesh["copies"] if self.sharding.tensor_parallel else None
        count = readers.size() if readers else dist.get_world_size()
        mine = (readers.get_local_rank() if readers else self.rank) * (BATCH // count)
        x = x[mine : mine + BATCH // count]
        self.optimizer.zero_grad()
        (self.model(x) - x[:, :3].square()).square().mean().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def whole(state: Any) -> Any:
    """A state with full arrays in place of tensors; collective."""
    if isinstance(state, DTensor):
        return state.full_tensor().detach().numpy().copy()
    if isinstance(state, torch.Tensor):
        return state.detach().numpy().copy()
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return state


@dataclass
class Leg:
    """What a rank did between two starts."""

    restored: Any
    """Whole state right after the restore; None at the beginning."""
    saved: dict[int, Any]
    """Whole state after those steps that were saved."""
    ended: Any
    failures: list[str]
    read: dict[str, int]
    kinds: set[str]
    """Types of restored tensors, and where their parts lie."""


def train(rank: int, url: str, sharding: Sharding, last: int, save: tuple[int, ...], restore: bool) -> Leg:
    """A leg of a training: from the newest step on, if ``restore``, to the ``last``."""
    job, events, restored, first, kinds = Job(rank, sharding), list[Event](), None, 1, set[str]()
    saved: dict[int, Any] = {}
    with checkpointer(url, rank, events) as saver:
        with Counting() as read:
            back = saver.restore("auto", like=job.state(), any_world_size=True) if restore else None
        if back is not None:
            tensors = back.replicated["model"].values()
            kinds = {f"{type(t).__name__} {t.placements} {t.to_local().device}" for t in tensors}
            job.load(back.replicated)
            restored, first = whole(job.state()), back.step + 1
        for step in range(first, last + 1):
            job.train(step)
            if step in save:
                saver.save(step, replicated=job.state(), local={"rank": rank})
                saved[step] = whole(job.state())
                saver.wait_copied()
    failures = [event.reason for event in events if isinstance(event, CheckpointFailed)]
    return Leg(restored, saved, whole(job.state()), failures, read, kinds)


def arrays(state: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of a whole state by name."""
    found: dict[str, np.ndarray] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= arrays(value, f"{prefix}{key}/")
        elif isinstance(value, np.ndarray):
            found[f"{prefix}{key}"] = value
    return found


def documented(rank: int, folder: str, code: str) -> list[int]:
    """The steps that an example in the docs takes."""
    os.chdir(folder)
    job, steps = Job(rank, Sharding((dist.get_world_size(),))), list[int]()

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        steps.append(step)
        result: torch.Tensor = model(torch.full((2, 10), 0.01 * step)).square().mean()
        return result

    exec(code, {"model": job.model, "optimizer": job.optimizer, "loss": loss, "attach": attach})
    return steps
