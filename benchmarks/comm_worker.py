"""One rank of :mod:`benchmarks.comm`: reads orders as JSON lines from stdin, and answers on stdout."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from outlast.comm import (
    CommConfig,
    GradientReducer,
)
from outlast.comm.config import UPDATE_BETA1, UPDATE_CLIP_RMS
from outlast.comm.direction import (
    Adam,
)
from outlast.trainer import GPT, Corpus, Loader
from outlast.trainer.config import DataConfig, ModelConfig, OptimConfig, TrainerConfig
from outlast.trainer.data import find_files, split_held_out
from outlast.trainer.optim import build_optimizer, lr_share

MODEL = ModelConfig(layers=6, heads=6, width=384, context=256)  # 10.8 M parameters
OPTIM = replace(OptimConfig(), lr=1e-3)
HELD_OUT = 4
"""Sequences of 256 tokens that each rank evaluates; the same in every run."""


@dataclass(slots=True)
class Variant:
    """One model and its method of averaging gradients; ``step`` counts its steps."""

    ddp: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    reducer: GradientReducer | None
    clip: bool
    step: int = 0


def build(name: str, seed: int = 0) -> Variant:
    """``dense``, ``fp16``, ``powersgd-RANK`` or ``SETTING=VALUE,SETTING=VALUE,…`` of ``[comm]``."""
    torch.manual_seed(seed)
    model = GPT(MODEL)
    method, _, amount = name.partition("-")
    # PyTorch's PowerSGD hook chains collectives in callbacks; over gloo that aborts with more than one bucket.
    if "=" in name:
        config, more = comm_config(name)
        bucket_mb = more["bucket_mb"]
    else:
        bucket_mb = {"powersgd": 1024.0, "dense": 25.0, "fp16": 25.0}[method]
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mb)
    if "=" in name:
        direction = Adam(more["beta1"], OPTIM.beta2, OPTIM.eps, more["clip_rms"])
        reducer = GradientReducer(model.named_parameters(), config, direction=direction)
        reducer.attach(ddp)
        optimizer = build_optimizer(model, OPTIM, directed=config.target == "update")
        return Variant(ddp, optimizer, reducer, config.target == "gradient")
    if method == "powersgd":
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=int(amount), start_powerSGD_iter=2, min_compression_rate=1
        )
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif method == "fp16":
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return Variant(ddp, build_optimizer(model, OPTIM), None, True)


def comm_config(words: str) -> tuple[CommConfig, dict[str, float]]:
    """``feedback=ef14,density=0.01,beta1=0.5`` as settings; and beta1, clip_rms and bucket_mb, with their defaults."""
    kinds = {field.name: type(field.default) for field in dataclasses.fields(CommConfig)}
    given: dict[str, Any] = {}
    more = {"beta1": UPDATE_BETA1, "clip_rms": UPDATE_CLIP_RMS, "bucket_mb": TrainerConfig().bucket_mb}
    for word in words.split(","):
        key, value = word.split("=", 1)
        if key in more:
            more[key] = float(value)
            continue
        given[key] = value if kinds[key] is str else float(value) if kinds[key] is float else int(value)
    return CommConfig(**given), more


def run(variant: Variant, loader: Loader, steps: int) -> dict[str, float]:
    """Take ``steps`` steps; returns mean seconds per step between two barriers, and bytes per step as reported."""
    wire_bytes = 0
    dist.barrier()
    start_s = time.perf_counter()
    for _ in range(steps):
        wire_bytes += step(variant, loader)
    dist.barrier()
    return {"step_s": (time.perf_counter() - start_s) / steps, "wire_bytes": wire_bytes / steps}


def step(variant: Variant, loader: Loader) -> int:
    """One training step; returns the bytes sent, as outlast reports."""
    variant.step += 1
    variant.optimizer.zero_grad()
    if variant.reducer is not None:
        variant.reducer.begin_step(variant.step)
    ((tokens, targets),) = loader.batches(variant.step)
    variant.ddp(tokens, targets).backward()
    wire_bytes = variant.reducer.end_step().wire_bytes if variant.reducer is not None else 0
    if variant.clip:
        nn.utils.clip_grad_norm_(variant.ddp.parameters(), 1.0)
    variant.optimizer.step()
    return wire_bytes


def learn(name: str, data: Data, seed: int, steps: int, every: int) -> dict[str, Any]:
    """Train a new model on the trainer's schedule; returns the held-out loss at an interval."""
    variant = build(name, seed)
    loader = data.loader(seed)
    held_out: list[tuple[int, float]] = []
    for number in range(1, steps + 1):
        for group in variant.optimizer.param_groups:
            group["lr"] = OPTIM.lr * lr_share(number - 1, OPTIM, steps)
        step(variant, loader)
        if number % every == 0:
            held_out.append((number, data.evaluate(variant.ddp.module)))
    if variant.reducer is not None:
        variant.reducer.close()
    return {"held_out": held_out}


class Data:
    """Training text in batches, and the held-out text."""

    def __init__(self, tokens: int) -> None:
        training, held_out = split_held_out(find_files(DataConfig()), 0.05)
        self._training, self._tokens = Corpus(training), tokens
        self._rank, self._n = dist.get_rank(), dist.get_world_size()
        batches = Loader(Corpus(held_out), 256, HELD_OUT, 1, seed=7, rank=self._rank, world_size=self._n)
        ((self._x, self._y),) = batches.batches(1)

    def loader(self, seed: int) -> Loader:
        """Sequences of at most 128 tokens, ``tokens`` to a rank and step."""
        length = min(self._tokens, 128)
        count = self._tokens // length
        return Loader(self._training, length, count, 1, seed=seed, rank=self._rank, world_size=self._n)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Mean held-out loss over all ranks' sequences."""
        loss = model(self._x, self._y)
        dist.all_reduce(loss)
        return float(loss) / self._n


def main() -> None:
    """``comm_worker TOKENS VARIANT …``: join the group, build the variants, and serve orders until stdin ends."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    data = Data(int(sys.argv[1]))
    variants = {name: build(name) for name in sys.argv[2:]}
    loader = data.loader(0)
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any]
        if order["do"] == "steps":
            answer = run(variants[order["variant"]], loader, order["steps"])
        else:
            answer = learn(order["variant"], data, order["seed"], order["steps"], order["every"])
        print(json.dumps(answer), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
