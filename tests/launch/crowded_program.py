"""A script that knows nothing of outlast, prints in each step on each rank, and says how many steps it has done."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

steps, folder, pause_s = int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
dist.init_process_group("gloo")
rank = dist.get_rank()
model = DistributedDataParallel(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
with (folder / f"steps_of_rank_{rank}").open("w") as done:
    for step in range(1, steps + 1):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"rank {rank} prints {'much ' * 100} in step {step}", flush=True)
        print(f"rank {rank} complains in step {step}", file=sys.stderr)
        done.write(f"{step}\n")
        done.flush()
        time.sleep(pause_s)
print(f"rank {rank} is done")
dist.destroy_process_group()
