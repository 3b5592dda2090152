"""A script that trains with Lightning: ``lightning_program.py RUN [--comm …] [--kills FOLDER] …``; prints its end."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from examples.lightning_module import Characters, Text
from outlast.integrations.lightning import SessionCallback
from tests.session.program import digest, kill_due

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Net(LightningModule):
    """With batch norm, dropout, a scheduler, and something of its own in Lightning's checkpoints."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        first = [nn.Linear(8, width), nn.BatchNorm1d(width), nn.GELU(), nn.Dropout(0.1)]
        self.net = nn.Sequential(*first, nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        self.seen = 0.0

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        x, y = batch
        self.seen += float(x.sum())  # of which samples it saw
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch: list[Tensor], number: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        steps = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20)
        return [optimizer], [{"scheduler": steps, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seen"] = self.seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen = checkpoint["seen"]


class Dies(Callback):
    """Kills its rank where a file says so, takes a notice, and counts validations."""

    def __init__(self, kills: Path | None, notice_at: int = 0) -> None:
        self.kills = kills
        self.notice_at = notice_at
        self.validations = 0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, number: int) -> None:
        if self.kills is not None and kill_due(self.kills, trainer.global_rank, trainer.global_step):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.notice_at == trainer.global_step > 0 and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid() if "OUTLAST_WATCHED" not in os.environ else os.getppid(), signal.SIGTERM)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.validations += not trainer.sanity_checking

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.validations = state["validations"]


def data(seed: int, samples: int) -> TensorDataset:
    """x (samples, 8) and y (samples, 1), with noise that cannot be learnt."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 8, generator=random)
    return TensorDataset(x, x.square().mean(dim=1, keepdim=True) + 0.5 * torch.randn(samples, 1, generator=random))


def loader(seed: int, samples: int, *, ordered: bool = False) -> DataLoader[Any]:
    """Whose sampler has a generator, which goes on from epoch to epoch."""
    sampler = None if ordered else RandomSampler(data(seed, samples), generator=torch.Generator().manual_seed(seed))
    return DataLoader(data(seed, samples), batch_size=16, sampler=sampler)


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("run", type=Path)
    words.add_argument("--comm", default="")
    words.add_argument("--kills", type=Path)
    words.add_argument("--notice-at", type=int, default=0)
    words.add_argument("--plain", action="store_true", help="without outlast")
    words.add_argument("--characters", action="store_true", help="the example's model and text")
    words.add_argument("--epochs", type=int, default=3)
    args = words.parse_args()
    seed_everything(0)
    dies = Dies(args.kills, args.notice_at)
    callbacks: list[Callback] = [dies]
    if not args.plain:
        comm: Any = {"density": float(args.comm)} if args.comm else None
        callbacks.append(SessionCallback(args.run, comm=comm, checkpoint={"every_steps": 1, "keep_last": 2}))
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=not args.plain,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=args.epochs,
        val_check_interval=1.0 if args.characters else 4,
    )
    net: Any = Net(128)
    if args.characters:
        net = Characters()
        trainer.fit(net, DataLoader(Text(0, 1600), batch_size=16), DataLoader(Text(9600, 64), batch_size=16))
    else:
        trainer.fit(net, loader(1, 16 * 10 * 2), loader(2, 64, ordered=True))
    if trainer.global_rank == 0:
        print(f"loss {float(trainer.callback_metrics['val_loss']):.6f}", flush=True)
        print(f"end {digest(net)} {getattr(net, 'seen', 0):.6f} {dies.validations} {trainer.global_step}", flush=True)


if __name__ == "__main__":
    main()
