"""The program that ``benchmarks.recovery`` runs: DDP steps, which know nothing of outlast.

``recovery_program.py FOLDER``: each rank writes to ``FOLDER/PID.json`` when it began, had imported, and had taken its
first step. It trains until ``FOLDER/stop`` is there.
"""

from __future__ import annotations

import time

BEGAN_S = time.time()

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

IMPORTED_S = time.time()


def main() -> None:
    """Train."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    met_s = time.time()
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1)))
    optimizer = torch.optim.AdamW(model.parameters())
    step, stop = 0, torch.zeros(1)
    while not stop.item():
        model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step == 1:
            told = {"rank": rank, "began": BEGAN_S, "imported": IMPORTED_S, "met": met_s, "stepped": time.time()}
            path = folder / f"{os.getpid()}.json"
            path.with_suffix(".tmp").write_text(json.dumps(told))
            path.with_suffix(".tmp").replace(path)
        time.sleep(0.1)
        stop.fill_(float((folder / "stop").exists()))
        dist.all_reduce(stop)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
