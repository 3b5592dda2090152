"""A script that knows nothing of outlast: ``STEPS [--wrap HOW] [--slow RANK] [--do WHAT --at STEP]``.

The slow rank is so from step ``--slow-from`` on, until the file ``--heal`` is there.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser()
parser.add_argument("steps", type=int)
parser.add_argument("--wrap", default="ddp", choices=["ddp", "fsdp2", "zero3"])
parser.add_argument("--slow", type=int, default=-1)
parser.add_argument("--slow-s", type=float, default=0.1)
parser.add_argument("--slow-from", type=int, default=0)
parser.add_argument("--heal", type=Path)
parser.add_argument("--do", default="", help="in the first start only")
parser.add_argument("--at", type=int, default=5)
given = parser.parse_args()

model: nn.Module = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters())
engine: Any = None
if given.wrap == "zero3":
    import deepspeed

    settings = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 3}}
    settings |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=True)
    model = engine
else:
    dist.init_process_group("gloo")
    if given.wrap == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters())
rank = dist.get_rank()
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
    if rank == given.slow and step >= given.slow_from and not (given.heal and given.heal.exists()):
        time.sleep(given.slow_s)
    time.sleep(0.02)
    loss = model(torch.randn(8, 16)).square().mean()
    if engine is not None:
        engine.backward(loss)
        engine.step()
    else:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
dist.barrier()
print(f"rank {rank} done", flush=True)
dist.destroy_process_group()
