"""Two ranks that train, print what comes of it, and of which rank 1 is killed in the first start.

A package finds the environment as the program has set it before importing it. ``standby_training.py FOLDER``: rank 1
waits for ``FOLDER/kill`` before it is killed.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "2"

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    """Train."""
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    rank, generation = dist.get_rank(), os.environ["OUTLAST_GENERATION"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Dropout(), torch.nn.GELU()))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(5):
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    (folder / f"{generation}_{rank}").write_text(
        f"{threads} {os.environ.get('TORCHINDUCTOR_CACHE_DIR')} {digest.hexdigest()}"
    )
    if generation == "0":
        while not (folder / "kill").exists():
            time.sleep(0.02)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
