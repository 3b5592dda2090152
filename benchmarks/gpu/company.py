"""outlast beside what people use with it, on one rank over NCCL: does each train, and is what must be equal equal?"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import outlast.comm
from benchmarks.gpu.harness import Report, Settings, one_rank, run
from outlast.checkpoint import CheckpointConfig, Checkpointer
from outlast.comm import CommConfig, GradientReducer

STEPS = 30
HOW: dict[str, Any] = {"target": "gradient", "feedback": "ef21", "density": 0.1, "dense_below": 64}


class Task:
    """A small network, and numbers that it can learn."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(0)
        self.width = settings.size(256, 32)
        self.device = settings.device
        self.model = nn.Sequential(
            nn.Linear(self.width, self.width),
            nn.GELU(),
            nn.Linear(self.width, self.width),
            nn.GELU(),
            nn.Linear(self.width, 8),
        ).to(settings.device)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(number % 2)
        x = torch.randn(64, self.width, generator=draw).to(self.device)
        return x, x[:, :8].argmax(1)


def ddp_of(model: nn.Module, settings: Settings) -> DistributedDataParallel:
    return DistributedDataParallel(model, device_ids=[0] if settings.cuda else None)


def learned(losses: list[float]) -> bool:
    return sum(losses[-3:]) < 0.9 * sum(losses[:3])


def autocast(report: Report, settings: Settings) -> None:
    """bf16 autocast, and twice the same bits."""
    ends = []
    losses: list[float] = []
    for _ in range(2):
        task = Task(settings)
        ddp = ddp_of(task.model, settings)
        reducer = outlast.comm.attach(ddp, **HOW)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for number in range(STEPS):
            x, y = task.batch(number)
            optimizer.zero_grad()
            with torch.autocast(settings.device.type, dtype=torch.bfloat16):
                loss = F.cross_entropy(ddp(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
        reducer.close()
        ends.append([p.detach().clone() for p in task.model.parameters()])
    same = all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    report.add("bf16 autocast", learned(losses) and same, losses=[losses[0], losses[-1]], same_bits_twice=same)


def scaler(report: Report, settings: Settings) -> None:
    """fp16 with a loss scale that overflows in a step: nothing moves in it, and training goes on."""
    task = Task(settings)
    ddp = ddp_of(task.model, settings)
    reducer = outlast.comm.attach(ddp, **HOW)
    assert isinstance(reducer, GradientReducer)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(settings.device.type, init_scale=2.0**10)
    losses, skipped, moved = [], [], []
    for number in range(STEPS):
        x, y = task.batch(number)
        if number == 10:
            x = x * 1e30
        reducer.begin_step(number + 1, loss_scale=scaler.get_scale())
        optimizer.zero_grad()
        with torch.autocast(settings.device.type, dtype=torch.float16 if settings.cuda else torch.bfloat16):
            loss = F.cross_entropy(ddp(x), y)
        if number == 10:
            loss = loss * torch.inf
        before = [p.detach().clone() for p in task.model.parameters()]
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        stats = reducer.end_step()
        scaler.step(optimizer)
        scaler.update()
        skipped.append(stats.skipped)
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, task.model.parameters(), strict=True)))
        losses.append(float(loss.detach()))
    reducer.close()
    right = skipped[10] and not moved[10] and sum(skipped) == 1 and all(moved[11:])
    report.add(
        "GradScaler, an overflow",
        bool(right) and learned(losses),
        scale=scaler.get_scale(),
        skipped=skipped.index(True) if any(skipped) else -1,
        losses=[losses[0], losses[-1]],
    )


def accumulation(report: Report, settings: Settings) -> None:
    """Two micro-batches under no_sync, by DDP and by a bare reducer; both give the same bits."""
    ends = []
    losses: list[float] = []
    for bare in (False, True):
        task = Task(settings)
        ddp = None if bare else ddp_of(task.model, settings)
        model: nn.Module = ddp if ddp is not None else task.model
        reducer: Any
        if ddp is not None:
            reducer = outlast.comm.attach(ddp, **HOW)
        else:
            reducer = GradientReducer(task.model.named_parameters(), CommConfig(**HOW))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        losses = []
        for number in range(STEPS):
            optimizer.zero_grad()
            for part in range(2):
                x, y = task.batch(2 * number + part)
                with ddp.no_sync() if ddp is not None and part == 0 else contextlib.nullcontext():
                    loss = F.cross_entropy(model(x), y) / 2
                    loss.backward()  # type: ignore[no-untyped-call]
            if isinstance(reducer, GradientReducer) and bare:
                reducer.reduce()
            optimizer.step()
            losses.append(float(loss.detach()))
        reducer.close()
        ends.append([p.detach().clone() for p in task.model.parameters()])
    off = max(float((a - b).abs().max()) for a, b in zip(*ends, strict=True))
    report.add(
        "accumulation: DDP and a bare loop",
        learned(losses) and off == 0.0,
        losses=[losses[0], losses[-1]],
        differ_by=off,
    )


def compiled(report: Report, settings: Settings) -> None:
    """A compiled model under DDP."""
    task = Task(settings)
    torch._dynamo.config.optimize_ddp = False
    ddp = ddp_of(task.model, settings)
    reducer = outlast.comm.attach(ddp, **HOW)
    step: Any = torch.compile(ddp) if settings.cuda else ddp
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for number in range(STEPS):
        x, y = task.batch(number)
        optimizer.zero_grad()
        loss = F.cross_entropy(step(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    reducer.close()
    report.add("torch.compile", learned(losses), losses=[losses[0], losses[-1]])


def hybrid(report: Report, settings: Settings) -> None:
    """HSDP on a mesh of one: it trains, and its state comes back from a checkpoint as it was."""
    task = Task(settings)
    mesh = init_device_mesh(settings.device.type, (1, 1), mesh_dim_names=("replicate", "shard"))
    for layer in task.model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(task.model, mesh=mesh)
    reducer = outlast.comm.attach(task.model, **HOW)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=5e-3)
    losses = []
    for number in range(STEPS):
        x, y = task.batch(number)
        optimizer.zero_grad()
        loss = F.cross_entropy(task.model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    with tempfile.TemporaryDirectory() as folder:
        model = dict(task.model.named_parameters())
        comm = reducer.state_dict()["local"]
        with Checkpointer(
            folder,
            CheckpointConfig(),
            rank=0,
            world_size=1,
            attempt_id="h",
            group=dist.group.WORLD,
            on_event=lambda event: None,
        ) as saver:
            saver.save(STEPS, replicated={"model": model}, local={"comm": comm}, eager={"comm"})
        held = {name: p.detach().to_local().clone() for name, p in model.items()}  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter in model.values():
                parameter.fill_(0.0)
        with Checkpointer(
            folder,
            CheckpointConfig(),
            rank=0,
            world_size=1,
            attempt_id="i",
            group=dist.group.WORLD,
            on_event=lambda event: None,
        ) as saver:
            found = saver.restore("auto", into={"model": model})
        same = found is not None and all(torch.equal(p.detach().to_local(), held[name]) for name, p in model.items())  # type: ignore[attr-defined]
    reducer.close()
    report.add("HSDP on a mesh of one", learned(losses) and same, losses=[losses[0], losses[-1]], restored=same)


def deepspeed(report: Report, settings: Settings) -> None:
    """ZeRO 0, 1 and 2."""
    if importlib.util.find_spec("deepspeed") is None or not settings.cuda:
        report.add("DeepSpeed", None, left_out="no deepspeed, or no GPU")
        return
    os.environ.setdefault("DS_BUILD_OPS", "0")
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29571",
    }
    ds = import_module("deepspeed")

    for stage in (0, 1, 2):
        task = Task(settings)
        plan = {
            "train_micro_batch_size_per_gpu": 64,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage, "overlap_comm": False, "contiguous_gradients": True},
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.AdamW(task.model.parameters(), lr=5e-3)
        engine, *_ = ds.initialize(model=task.model, optimizer=optimizer, config=plan)
        reducer = outlast.comm.attach(engine, **HOW)
        losses = []
        for number in range(STEPS):
            x, y = task.batch(number)
            loss = F.cross_entropy(engine(x.bfloat16()).float(), y)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
        reducer.close()
        report.add(f"DeepSpeed {ds.__version__}, ZeRO {stage}", learned(losses), losses=[losses[0], losses[-1]])


def methods(report: Report, settings: Settings) -> None:
    """Every way to compress under DDP, with updates and gradients: a loss that falls."""
    ways: list[dict[str, Any]] = [
        {"compressor": name, "target": "gradient", "feedback": "ef14", "density": 0.1, "dense_below": 64}
        for name in ("topk", "block-topk", "sign", "int8", "int4", "natural", "lowrank", "gear", "dense")
    ]
    ways += [
        {"target": "update", "density": 0.05, "dense_below": 64},
        {"target": "gradient", "feedback": "econtrol", "density": 0.2, "dense_below": 64},
        {"target": "gradient", "transport": "two-phase", "density": 0.1, "dense_below": 64},
        {"target": "gradient", "feedback": "ef21-sgdm", "density": 0.1, "dense_below": 64, "resync_every_steps": 5},
        {"target": "gradient", "residual": "int8", "density": 0.1, "dense_below": 64},
        {"target": "gradient", "compressor": "auto"},
    ]
    failed = []
    for way in ways:
        task = Task(settings)
        ddp = ddp_of(task.model, settings)
        reducer = outlast.comm.attach(ddp, **way)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.005 if way["target"] == "update" else 0.3)
        losses = []
        for number in range(STEPS):
            x, y = task.batch(number)
            optimizer.zero_grad()
            loss = F.cross_entropy(ddp(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
        reducer.close()
        if not losses[-1] < losses[0]:
            failed.append(f"{way}: {losses[0]:.3f} to {losses[-1]:.3f}")
    report.add("every method under DDP", not failed, ways=len(ways), failed=failed)


def section(report: Report, settings: Settings) -> None:
    """One after the other."""
    one_rank(settings)
    for part in (autocast, scaler, accumulation, methods, hybrid, compiled, deepspeed):
        report.attempt(part.__name__, partial(part, report, settings))


if __name__ == "__main__":
    run("company", section)
