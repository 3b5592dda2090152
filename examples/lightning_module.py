"""Lightning on a small model of characters; what outlast adds is marked.

    outlast launch --nproc-per-node 2 --run-dir runs/lightning_module examples/lightning_module.py runs/lightning_module

Stop it whenever you like and start it again: it goes on from the newest complete checkpoint, bit for bit.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from outlast.integrations.lightning import SessionCallback  # outlast

CONTEXT, WIDTH = 32, 128


class Text(Dataset[tuple[Tensor, Tensor]]):
    """Windows of the standard library's sources: ``CONTEXT`` bytes, and the bytes that follow each of them."""

    def __init__(self, first: int, windows: int) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        data = b"".join(file.read_bytes() for file in files)[first * CONTEXT : (first + windows) * CONTEXT + 1]
        self.bytes = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()

    def __len__(self) -> int:
        """How many windows."""
        return len(self.bytes) // CONTEXT

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """The window of that number."""
        window = self.bytes[number * CONTEXT : (number + 1) * CONTEXT + 1]
        return window[:-1], window[1:]


class Characters(LightningModule):
    """Predicts the next byte with a recurrent network."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.recur = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, 256)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean loss of a batch."""
        x, y = batch
        return cross_entropy(self.head(self.drop(self.recur(self.embed(x))[0])).flatten(0, 1), y.flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        """What is to be minimized."""
        return self.loss(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
        """Over all ranks."""
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW, whose learning rate falls."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    """Train for ``--epochs`` epochs, over all starts together."""
    words = argparse.ArgumentParser()
    words.add_argument("run")
    words.add_argument("--epochs", type=int, default=3)
    args = words.parse_args()
    seed_everything(0)
    module = Characters()
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[SessionCallback(args.run)],  # outlast
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train = DataLoader(Text(0, 1600), batch_size=16, shuffle=True)
    trainer.fit(module, train, DataLoader(Text(9600, 64), batch_size=16))
    if trainer.is_global_zero and "val_loss" in trainer.callback_metrics:  # not if nothing was left to do
        loss = float(trainer.callback_metrics["val_loss"])
        print(f"loss {loss:.4f} after step {trainer.global_step}", flush=True)


if __name__ == "__main__":
    main()
