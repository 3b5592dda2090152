"""The program that ``benchmarks.watch`` runs watched and unwatched: steps of about 100 ms, by one of four ways.

``collectives`` issues 50 of its own, alone; ``ddp``, ``fsdp2`` and ``deepspeed`` train a stack of layers on two ranks.
Prints the seconds of each step, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

LAYERS, WIDTH = 16, 256
COLLECTIVES = 50


def _collectives(products: int) -> Callable[[], object]:
    a, small = torch.randn(256, 256), torch.ones(1024)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(4))], lr=0.1)

    def step() -> None:
        for _ in range(COLLECTIVES):
            for _ in range(products):
                a @ a
            dist.all_reduce(small)
        optimizer.step()

    return step


def _stack() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def _training(model: torch.nn.Module, rows: int) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = torch.randn(rows, WIDTH)

    def step() -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _ddp(rows: int) -> Callable[[], object]:
    layer_mb = 4 * WIDTH * (WIDTH + 1) / (1 << 20)
    return _training(torch.nn.parallel.DistributedDataParallel(_stack(), bucket_cap_mb=layer_mb), rows)


def _fsdp2(rows: int) -> Callable[[], object]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = _stack()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _training(model, rows)


def _deepspeed(rows: int) -> Callable[[], object]:
    from outlast.deepspeed_compat import import_deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": rows,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    model = _stack()
    deepspeed = import_deepspeed()[0]
    engine: Any = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]
    batch = torch.randn(rows, WIDTH)

    def step() -> None:
        engine.backward(engine(batch).square().mean())
        engine.step()

    return step


WAYS: dict[str, Callable[[int], Callable[[], object]]] = {
    "collectives": _collectives,
    "ddp": _ddp,
    "fsdp2": _fsdp2,
    "deepspeed": _deepspeed,
}


def main() -> None:
    """``way size steps``: the size is the products between two collectives, or the rows of a batch."""
    way, size, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    step = WAYS[way](size)
    walls, cpus = [], []
    for _ in range(steps):
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        step()
        walls.append(time.perf_counter() - wall_s)
        cpus.append(time.process_time() - cpu_s)
    if os.environ["RANK"] == "0":
        print("\n" + json.dumps({"wall_s": walls, "cpu_s": cpus}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
