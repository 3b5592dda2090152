"""The program that ``benchmarks.beside`` runs under each tool: DDP steps of about 40 ms, fed by a DataLoader.

``beside_program.py KIND FOLDER STEPS TOOL``: from step 60 on rank 1 suffers KIND; the time is written to
``FOLDER/began`` before. It knows nothing of outlast. For TraceML it marks its steps, as TraceML's manual asks loops of
one's own to. For torch's flight recorder a thread writes each rank's collectives to ``FOLDER/fr_RANK`` five times a
second: NCCL's watchdog does so when a collective has timed out, and gloo has nothing for it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

KINDS = ("SIGSTOP", "skipped collective", "slow in backward", "exit with status 0", "slow data")
AT_STEP, CULPRIT, SLOW_S, STEP_S = 60, 1, 0.15, 0.03


class _Sleeps(torch.autograd.Function):
    """Takes its time in forward, as a model does, and in backward where told to."""

    seconds = 0.0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(STEP_S)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        time.sleep(_Sleeps.seconds)
        return gradient


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(_Sleeps.apply(self.first(x)))  # type: ignore[no-untyped-call]
        return found


class _Data(torch.utils.data.Dataset[torch.Tensor]):
    """One batch an item, so that what an item takes is what a step waits."""

    seconds = 0.0

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, item: int) -> torch.Tensor:
        time.sleep(_Data.seconds)
        return torch.full((8, 64), float(item % 7))


def _suffer(kind: str) -> None:
    if kind == "SIGSTOP":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "exit with status 0":
        os._exit(0)
    elif kind == "slow in backward":
        _Sleeps.seconds = SLOW_S
    elif kind == "slow data":
        _Data.seconds = SLOW_S


def _dump(folder: Path, rank: int) -> None:
    recorder: Any = importlib.import_module("torch._C._distributed_c10d")
    while True:
        beside = folder / f"new_{rank}"
        beside.write_bytes(recorder._dump_fr_trace_json())
        beside.replace(folder / f"fr_{rank}")
        time.sleep(0.2)


def main() -> None:
    """Train."""
    torch.set_num_threads(1)
    kind, folder, steps, tool = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = DistributedDataParallel(_Model())
    optimizer = torch.optim.AdamW(model.parameters())
    marked: Any = contextlib.nullcontext
    if tool == "traceml":
        traceml: Any = importlib.import_module("traceml_ai")
        traceml.init(mode="auto")
        marked = lambda: traceml.trace_step(model)  # noqa: E731
    if tool == "torchfrtrace":
        threading.Thread(target=_dump, args=(folder, rank), daemon=True).start()
    loader = torch.utils.data.DataLoader(_Data(steps), batch_size=None)
    for step, batch in enumerate(loader, 1):
        is_it = step == AT_STEP and rank == CULPRIT
        if is_it:
            (folder / "began").write_text(repr(time.time()))
            _suffer(kind)
        with marked():
            model(batch).square().mean().backward()
            if not (is_it and kind == "skipped collective"):
                dist.all_reduce(torch.ones(1))  # the loss, for a log
            optimizer.step()
            optimizer.zero_grad()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
