"""A script that knows nothing of outlast; rank 1 is held up by one thing after the other.

``python delayed_program.py GAP_STEPS PHASE_STEPS``
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

HELD_S = 0.12
PHASES = ("garbage", "data", "work", "data of all")
GAP, LENGTH = int(sys.argv[1]), int(sys.argv[2])
WHAT = {
    GAP + place * (GAP + LENGTH) + one: what for place, what in enumerate(PHASES) for one in range(LENGTH)
}  # by step, from 0
COMPILES = GAP + len(PHASES) * (GAP + LENGTH)


class Rows(IterableDataset[torch.Tensor]):
    """A batch a step."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        for step in range(COMPILES + GAP):
            what = WHAT.get(step, "")
            if what == "data of all" or (what == "data" and rank == 1):
                time.sleep(HELD_S)
            yield torch.randn(8 * (8 if what == "work" and rank == 1 else 1), 16)


def collect() -> None:
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < HELD_S:
        gc.collect()


def compile_something() -> None:
    began_s, number = time.perf_counter(), 0
    while time.perf_counter() - began_s < 5 * HELD_S:
        number += 1
        names: dict[str, object] = {}
        lines = "\n".join(f"    x = x * {one} + 1" for one in range(60))
        exec(f"def f{number}(x):\n{lines}\n    return x", names)
        torch.compile(names[f"f{number}"], backend="eager")(torch.ones(2))


dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_num_threads(1)
model = DistributedDataParallel(nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
if rank == 1:
    compile_something()  # the compiler is imported before the first step; a slow start is no fault
for step, rows in enumerate(DataLoader(Rows(), batch_size=None)):
    if rank == 1 and WHAT.get(step) == "garbage":
        collect()
    if rank == 1 and step == COMPILES:
        compile_something()
    time.sleep(0.02 * len(rows) / 8)
    model(rows).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
dist.barrier()
print(f"rank {rank} done", flush=True)
dist.destroy_process_group()
