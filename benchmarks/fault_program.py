"""The program whose faults ``benchmarks.faults`` provokes: DDP steps of about 40 ms, which know nothing of outlast.

``fault_program.py FOLDER STEPS``: in start number N of the run, the rank and kind in ``FOLDER/N.json`` are what goes
wrong, once 25 steps are done; the time is written to ``FOLDER/N.began`` before. Without such a file it trains.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

AT_STEP = 25
SLOW_S, SLOW_STEPS = 0.08, 60
ALL_STAND_S = 15.0


class _Nothing:
    def __init__(self) -> None:
        self.me = self


def _hold_gil(seconds: int) -> None:
    """A C function that is called without letting go of the interpreter's lock."""
    ctypes.PyDLL(None).sleep(seconds)


def _at_once(kind: str, rank: int, size: int) -> None:
    """What happens in one step, on one rank."""
    if kind == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "SIGSTOP":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "exit with status 0":
        os._exit(0)
    elif kind == "exception":
        raise ValueError("a batch that cannot be read")
    elif kind == "segmentation fault":
        ctypes.string_at(0)
    elif kind == "sleep before a collective":
        time.sleep(1000)
    elif kind == "interpreter's lock held":
        _hold_gil(1000)
    elif kind == "skipped collective":
        pass
    elif kind == "collective of another size":
        dist.all_reduce(torch.ones(1000))
    elif kind == "other collective":
        dist.broadcast(torch.ones(1), src=rank)
    else:
        raise ValueError(f"unknown fault {kind!r}")


def main() -> None:
    """Train."""
    torch.set_num_threads(1)
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    plan = folder / f"{os.environ['OUTLAST_GENERATION']}.json"
    fault = json.loads(plan.read_text()) if plan.exists() else {}
    kind, whose = fault.get("kind", ""), fault.get("rank", -1)
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1)))
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(steps):
        is_it = whose in (rank, "all")
        if kind and step == AT_STEP:
            if is_it:
                plan.with_suffix(".began").write_text(repr(time.time()))
            if kind == "all evaluate":
                time.sleep(ALL_STAND_S)
            elif kind in ("slow", "garbage collection"):
                pass
            elif is_it:
                _at_once(kind, rank, size)
            if kind in ("skipped collective", "collective of another size", "other collective") and not is_it:
                dist.all_reduce(torch.ones(1))
        if is_it and AT_STEP <= step < AT_STEP + SLOW_STEPS:
            if kind == "slow":
                time.sleep(SLOW_S)
            elif kind == "garbage collection":
                garbage = [_Nothing() for _ in range(200_000)]
                del garbage
                gc.collect()
        time.sleep(0.03)
        loss = model(torch.randn(8, 64)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
