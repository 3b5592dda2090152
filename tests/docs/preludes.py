"""What examples take for granted: the names that a reader's own program has. Each example gets fresh ones on each rank.

Examples of a docstring also see the names of its module.
"""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import outlast
from tests.diagnostics.report.synthetic import SyntheticRun

Names = dict[str, Any]


class Model(nn.Module):
    """Two blocks with dropout, eight numbers in and one out; given a batch it returns the loss, as DeepSpeed likes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 64), nn.Linear(64, 64)])
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(64, 1)

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """(batch, 8) to (batch, 1), or a batch to its loss."""
        if isinstance(x, tuple):
            return nn.functional.mse_loss(self(x[0]), x[1])
        for block in self.blocks:
            x = self.drop(block(x).relu())
        return self.head(x)


def seeded_model() -> Model:
    """Equal weights on all ranks; from then on each rank drops entries of its own."""
    torch.manual_seed(0)
    model = Model()
    torch.manual_seed(1 + dist.get_rank())
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    """x (16, 8) and y (16, 1), other ones on each rank."""
    generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
    x = torch.randn(16, 8, generator=generator)
    return x, x.square().mean(dim=1, keepdim=True)


def loss(model: nn.Module, step: int) -> Tensor:
    """Of this rank's batch."""
    x, y = batch(step)
    return nn.functional.mse_loss(model(x), y)


def loop() -> Names:
    """A model, the same under DDP, and its optimizer."""
    model = seeded_model()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return {"model": model, "ddp": ddp, "optimizer": optimizer, "batch": batch, "loss": loss, "step": 1} | SHARED


def adversaries() -> Names:
    """A generator's samples, real ones, and a discriminator with compressed gradients, all on their way."""
    torch.manual_seed(0)
    generator, discriminator = (DistributedDataParallel(nn.Linear(80, 80)) for _ in range(2))
    real, noise = (torch.randn(16, 80) for _ in range(2))
    return {
        "discriminator": discriminator,
        "compressed": outlast.comm.attach(discriminator),
        "optimizer_d": torch.optim.SGD(discriminator.parameters(), lr=1e-3),
        "optimizer_g": torch.optim.SGD(generator.parameters(), lr=1e-3),
        "real": real,
        "fake": generator(noise),
        "loss_of": lambda verdict, wanted: (verdict - wanted).square().mean(),
    }


def unwrapped() -> Names:
    """A model that no DDP has seen."""
    model = seeded_model()
    return {"model": model, "batch": batch, "loss": loss, "step": 1, "fully_shard": fully_shard} | SHARED


def sharded() -> Names:
    """A model under FSDP2, and its optimizer."""
    names = unwrapped()
    for block in names["model"].blocks:
        fully_shard(block)
    fully_shard(names["model"])
    return names | {"optimizer": torch.optim.AdamW(names["model"].parameters(), lr=1e-3)}


def deepspeed() -> Names:
    """DeepSpeed's settings, ZeRO 2, and a model for it."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(dist.get_rank()))
    warnings.simplefilter("default")  # DeepSpeed's are not ours
    module: Any = import_module("deepspeed")
    import_module("deepspeed.utils").logger.setLevel("ERROR")
    import_module("deepspeed.ops").__compatible_ops__ = {}  # else it compiles for a minute what nothing here calls
    module.init_distributed("gloo", verbose=False)
    settings = {
        "train_micro_batch_size_per_gpu": 16,
        "optimizer": {"type": "SGD", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    return unwrapped() | {"deepspeed": module, "settings": settings}


def saved_run() -> Names:
    """Step 200 of a run, in ``runs/stdlib_gpt/checkpoints``."""
    torch.manual_seed(0)
    tensors = {"token.weight": torch.randn(512, 64), "norm.weight": torch.ones(64)}
    with outlast.checkpoint.attach("runs/stdlib_gpt/checkpoints") as checkpointer:
        checkpointer.save(200, replicated={"model": tensors}, local={})
    return {"zarr": import_module("zarr")}


def saved_model() -> Names:
    """The model of ``loop``, its optimizer and scheduler after five steps, saved in ``runs/mine/checkpoints``."""
    names = loop()
    model, optimizer = names["model"], names["optimizer"]
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20)
    for step in range(5):
        optimizer.zero_grad()
        loss(names["ddp"], step).backward()
        optimizer.step()
        scheduler.step()
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    with outlast.checkpoint.attach("runs/mine/checkpoints") as checkpointer:
        checkpointer.save(20, replicated={name: part.state_dict() for name, part in parts.items()})
    dist.barrier()
    return names | {"scheduler": scheduler}


def reported_run() -> Names:
    """The events of a run of two ranks that was started twice, in ``runs/stdlib_gpt``."""
    run = SyntheticRun(run_dir=Path("runs/stdlib_gpt"), ranks=2, steps=20)
    run.start()
    run.train(1, 10)
    run.start(generation=1, first_step=11)
    run.train(11, 20)
    return {}


SHARED: Names = {"torch": torch, "nn": nn, "outlast": outlast}
