"""``slow_rank.py RANK SECONDS CONFIG …``: the trainer, with one rank that sleeps that long in every step."""

import sys
import time

import torch

from outlast.trainer.data import Loader
from outlast.trainer.main import main

SLOW_RANK, DELAY_S = int(sys.argv[1]), float(sys.argv[2])
batches_at_once = Loader.batches


def batches(loader: Loader, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if loader.rank == SLOW_RANK:
        time.sleep(DELAY_S)
    return batches_at_once(loader, step)


Loader.batches = batches  # type: ignore[method-assign]
sys.exit(main(sys.argv[3:]))
