"""``slow_rank.py RANK SECONDS CONFIG …``: the trainer, with one rank that sleeps that long in every step.

Ends by printing how long its sleeps took it, which on a busy machine is longer: ``slowed by 50.1 ms``, the median.
"""

import statistics
import sys
import time

import torch

from outlast.trainer.data import Loader
from outlast.trainer.main import main

SLOW_RANK, DELAY_S = int(sys.argv[1]), float(sys.argv[2])
batches_at_once = Loader.batches
slept_s: list[float] = []


def batches(loader: Loader, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if loader.rank == SLOW_RANK:
        start_s = time.perf_counter()
        time.sleep(DELAY_S)
        slept_s.append(time.perf_counter() - start_s)
    return batches_at_once(loader, step)


Loader.batches = batches  # type: ignore[method-assign]
status = main(sys.argv[3:])
if slept_s:
    print(f"slowed by {1e3 * statistics.median(slept_s):.1f} ms", flush=True)
sys.exit(status)
