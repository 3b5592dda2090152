"""A DDP script that knows nothing of outlast: ``STEPS [--slow RANK] [--do WHAT --at STEP]``; its first start only."""

from __future__ import annotations

import argparse
import os
import signal
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser()
parser.add_argument("steps", type=int)
parser.add_argument("--slow", type=int, default=-1)
parser.add_argument("--do", default="")
parser.add_argument("--at", type=int, default=5)
given = parser.parse_args()

dist.init_process_group("gloo")
rank = dist.get_rank()
model = DistributedDataParallel(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 1)))
optimizer = torch.optim.AdamW(model.parameters())
is_first = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) == 0
for step in range(given.steps):
    if is_first and step == given.at and rank == 1:
        if given.do == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif given.do == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif given.do == "sleep":
            time.sleep(1000)
        elif given.do == "compute":
            until_s = time.monotonic() + 20
            while time.monotonic() < until_s:
                pass
        elif given.do == "raise":
            raise ValueError("a batch that cannot be read")
    if rank == given.slow:
        time.sleep(0.1)
    time.sleep(0.02)
    model(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
dist.barrier()
print(f"rank {rank} done", flush=True)
dist.destroy_process_group()
