"""``leaving_rank.py RANK STEP exit|_exit CONFIG …``: the trainer, in whose first start the data of a rank leave."""

from __future__ import annotations

import os
import sys

import torch

from outlast.trainer.data import Loader
from outlast.trainer.main import main

RANK, STEP, HOW = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
batches_at_once = Loader.batches


def batches(loader: Loader, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if (loader.rank, step, os.environ["OUTLAST_GENERATION"]) == (RANK, STEP, "0"):
        if HOW == "exit":
            sys.exit(0)
        os._exit(0)
    return batches_at_once(loader, step)


Loader.batches = batches  # type: ignore[method-assign]
sys.exit(main(sys.argv[4:]))
