"""``slow_rank.py RANK SECONDS[@FIRST-LAST] CONFIG …``: the trainer, with one rank that sleeps that long in every step.

``0.1,0.5@12-44`` sleeps 0.1 s and 0.5 s in turn, in steps 12 to 44 only.

Ends by printing how long its sleeps took it, which on a busy machine is longer: ``slowed by 50.1 ms``, the median.
"""

import statistics
import sys
import time

import torch

from outlast.trainer.data import Loader
from outlast.trainer.main import main

SLOW_RANK = int(sys.argv[1])
delays, _, phase = sys.argv[2].partition("@")
DELAYS_S = [float(one) for one in delays.split(",")]
FIRST, LAST = map(int, phase.split("-")) if phase else (1, 1 << 40)
batches_at_once = Loader.batches
slept_s: list[float] = []


def batches(loader: Loader, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if loader.rank == SLOW_RANK and FIRST <= step <= LAST:
        start_s = time.perf_counter()
        time.sleep(DELAYS_S[step % len(DELAYS_S)])
        slept_s.append(time.perf_counter() - start_s)
    return batches_at_once(loader, step)


Loader.batches = batches  # type: ignore[method-assign]
status = main(sys.argv[3:])
if slept_s:
    print(f"slowed by {1e3 * statistics.median(slept_s):.1f} ms", flush=True)
sys.exit(status)
