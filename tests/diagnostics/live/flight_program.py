"""Two ranks that issue every kind of collective; rank 0 prints what torch's flight recorder says of it."""

from __future__ import annotations

import json
import os
import time

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from outlast.diagnostics.live.flight import buffer_variable, flight_counts, flight_entries

os.environ[buffer_variable()] = "200"
assert flight_counts() == {}
dist.init_process_group("gloo")
rank = dist.get_rank()
mark = 0


def said(name: str) -> None:
    """Print the collectives since the last call."""
    global mark
    for _ in range(500):  # what waits for a collective goes on a moment before torch notes that it is complete
        entries = [one for one in flight_entries(1000) if one.record >= mark]
        if all(one.completed_ns for one in entries):
            break
        time.sleep(0.01)
    mark = max((one.record + 1 for one in entries), default=mark)
    ours = [(one.op, one.nbytes, one.completed_ns > 0, one.group) for one in entries]
    if rank == 0:
        print(json.dumps({"name": name, "entries": ours}), flush=True)


ddp = DistributedDataParallel(nn.Linear(4, 3))
said("ddp is made")
ddp(torch.ones(2, 4)).sum().backward()
said("ddp")
mesh = init_device_mesh("cpu", (2,))
sharded = nn.Linear(4, 3)
fully_shard(sharded, mesh=mesh)
said("fsdp is made")
sharded(torch.ones(2, 4)).sum().backward()
said("fsdp")
functional.wait_tensor(functional.all_reduce(torch.ones(5), "sum", dist.group.WORLD))
said("functional")
gathered = [None, None]
dist.all_gather_object(gathered, {"a": 1})
said("objects")
dist.all_to_all_single(torch.empty(4), torch.ones(4))
said("all to all")
dist.reduce_scatter_tensor(torch.empty(3, dtype=torch.bfloat16), torch.ones(6, dtype=torch.bfloat16))
said("reduce scatter")
dist.all_reduce(torch.ones(6), group=dist.new_group([0, 1]))
said("another group")
dist.barrier()
said("barrier")
assert flight_counts()
assert not any(count.pending for count in flight_counts().values())
dist.destroy_process_group()
