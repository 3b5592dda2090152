"""A script that knows nothing of outlast; from step 20 on, rank 1 is held up by WHAT until the file HEAL is there.

``python held_program.py WHAT HEAL STEPS WIDTH``: ``data``, ``garbage``, ``work``, or ``nothing``, which leaves it to
others to hold it up. Ends at the latest after so many steps; all ranks exchange a matrix of WIDTH x WIDTH.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

HELD_S, OWN_S, ROWS = 0.2, 0.03, 4
WHAT, HEAL, STEPS, WIDTH = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])


def is_held(step: int, what: str) -> bool:
    return rank == 1 and what == WHAT and step >= 20 and not HEAL.exists()


class Rows(IterableDataset[torch.Tensor]):
    """A batch a step."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        for step in range(STEPS):
            if is_held(step, "data"):
                time.sleep(HELD_S)
            yield torch.randn(ROWS * (8 if is_held(step, "work") else 1), WIDTH)


def compute(seconds: float) -> None:
    """Use that much time of a processor."""
    until_s = time.thread_time() + seconds
    while time.thread_time() < until_s:
        pass


dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_num_threads(1)
model = DistributedDataParallel(nn.Linear(WIDTH, WIDTH, bias=False))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
over = torch.zeros(1)
for step, rows in enumerate(DataLoader(Rows(), batch_size=None)):
    if is_held(step, "garbage"):
        began_s = time.perf_counter()
        while time.perf_counter() - began_s < HELD_S:
            gc.collect()
    compute(OWN_S * len(rows) / ROWS)
    model(rows).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 19:  # all end together
        over[0] = float(HEAL.exists())
        dist.all_reduce(over)
        if over[0] == dist.get_world_size():
            break
dist.barrier()
print(f"rank {rank} done", flush=True)
dist.destroy_process_group()
