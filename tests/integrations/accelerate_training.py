"""A loop with Accelerate on this rank, from its first step to its end, and what a test wants to happen on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch.nn.functional import mse_loss

from outlast.errors import OutlastError
from tests.integrations.hf_training import as_launched
from tests.session.program import digest, network


@dataclass(frozen=True, slots=True)
class Loop:
    """One start of a loop."""

    steps: int = 25
    """Of the run; an epoch has 8 batches on each of two ranks, and four steps."""
    comm: Any = None
    plain: bool = False
    """Without outlast."""
    clip: bool = False
    seedable: bool = False
    lr: float = 1e-2
    kill_at: int = 0
    notice_at: int = 0
    stop_at: int = 0
    sharding: str = ""
    """``fsdp1``, ``fsdp2`` or ``zero0`` to ``zero3``; nothing is DDP."""


def sharding_of(plan: Loop) -> dict[str, Any]:
    """What an Accelerator is told of it."""
    from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)
    if plan.sharding.startswith("fsdp"):
        return {"cpu": True, "fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=int(plan.sharding[4:]))}
    if plan.sharding:
        settings = {
            "train_micro_batch_size_per_gpu": 16,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": int(plan.sharding[4:]), "stage3_param_persistence_threshold": 0},
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1_000_000,
        }
        return {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=settings)}
    return {"cpu": True}


def loop(rank: int, folder: str, plan: Loop) -> dict[str, Any]:
    """What became of it on this rank."""
    from accelerate import Accelerator, DataLoaderConfiguration

    from outlast.integrations.accelerate import AcceleratedSession

    as_launched(rank, folder)
    torch.manual_seed(3)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(1250, 8, generator=random)
    y = x.square().mean(dim=1, keepdim=True) + 0.5 * torch.randn(1250, 1, generator=random)
    data = torch.utils.data.TensorDataset(x[:250], y[:250])  # the rest is held out
    accelerator = Accelerator(
        **sharding_of(plan),
        gradient_accumulation_steps=2,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=plan.seedable),
    )
    bare = network()
    optimizer: Any = torch.optim.AdamW(bare.parameters(), lr=plan.lr)
    scheduler: Any = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=200)
    loader: Any = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(bare, optimizer, loader, scheduler)
    losses: list[float] = []

    def train(batches: Iterator[Any]) -> None:
        for step, (inputs, target) in enumerate(batches):
            with accelerator.accumulate(model):
                loss = mse_loss(model(inputs), target)
                accelerator.backward(loss)
                if plan.clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if accelerator.sync_gradients and session is not None:
                step = session.done_step + 1
                if step == plan.kill_at and rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                if step == plan.notice_at and rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                if step == plan.stop_at:
                    break

    def epochs() -> Iterator[Any]:
        done = 0
        while True:
            for batch in loader:
                yield batch
                done += accelerator.sync_gradients
                if done == plan.steps:
                    return

    session = None
    try:
        if plan.plain:
            train(epochs())
        else:
            with AcceleratedSession(
                accelerator,
                "run",
                model,
                optimizer,
                comm=plan.comm,
                checkpoint={"every_steps": 3},
                scheduler=scheduler,
            ) as session:
                train(session.batches(loader, plan.steps))
    except SystemExit as end:
        return {"status": end.code}
    except OutlastError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    model.eval()
    loss = float(mse_loss(model(x[250:]), y[250:]).detach())
    gathered: Any = nullcontext()
    if plan.sharding == "zero3":
        gathered = import_module("deepspeed").zero.GatheredParameters(list(bare.parameters()))
    with gathered:
        weights = digest(bare)
    return {"weights": weights, "lr": scheduler.get_last_lr(), "losses": losses[-4:], "loss": loss}
