"""A script that issues every kind of collective, each in a group of its own; then it waits, and writes what its ring in
shared memory holds to the file that its argument names."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from outlast.diagnostics.live import read_ring, ring_path, shm_directory

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
groups: dict[str, str] = {}


def issue(what: str, collective: Callable[[dist.ProcessGroup], object]) -> None:
    group = dist.new_group(list(range(world)))
    assert isinstance(group, dist.ProcessGroup)
    groups[what] = group.group_name
    collective(group)


def train(model: nn.Module) -> None:
    model(torch.ones(2, 8)).sum().backward()


def compiled(group: dist.ProcessGroup) -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return functional.all_reduce(x * 2, "sum", group) + 1

    torch.compile(step, backend="aot_eager")(torch.ones(7))


def both_ways(group: dist.ProcessGroup) -> None:
    there, back = torch.ones(3), torch.empty(3)
    ops = [dist.P2POp(dist.isend, there, 1 - rank, group), dist.P2POp(dist.irecv, back, 1 - rank, group)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()


issue("ddp", lambda group: train(DistributedDataParallel(nn.Linear(8, 8), process_group=group)))
issue("all_to_all", lambda group: dist.all_to_all_single(torch.empty(4), torch.ones(4), group=group))
issue("objects", lambda group: dist.all_gather_object([None] * world, {"a": rank}, group=group))
issue("functional", lambda group: functional.wait_tensor(functional.all_reduce(torch.ones(5), "sum", group)))
issue("compiled", compiled)
issue("p2p", both_ways)
mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
train(fully_shard(nn.Linear(8, 8), mesh=mesh))
groups["fsdp2"] = mesh.get_group().group_name
mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("copies", "shard"))
train(fully_shard(nn.Linear(8, 8), mesh=mesh))
groups["hsdp"] = mesh.get_group("copies").group_name
issue("barrier", lambda group: dist.barrier(group))
time.sleep(2.0)  # what has ended is copied when all is quiet
ring = read_ring(ring_path(shm_directory(Path(os.environ["OUTLAST_RUN_DIR"])), rank))
found = {what: [one.op for one in ring.records if one.group.split()[0] == name] for what, name in groups.items()}
Path(f"{sys.argv[1]}_{rank}").write_text(json.dumps(found))
dist.destroy_process_group()
