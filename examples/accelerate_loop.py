"""A loop with Hugging Face's Accelerate; what outlast adds is marked.

    outlast launch --nproc-per-node 2 --run-dir runs/accelerate examples/accelerate_loop.py runs/accelerate

Stop it whenever you like and start it again: it goes on inside the epoch, bit for bit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn.functional import mse_loss

from outlast.integrations.accelerate import AcceleratedSession  # outlast


def main() -> None:
    """Learn the mean square of eight numbers."""
    words = argparse.ArgumentParser()
    words.add_argument("run", type=Path)
    words.add_argument("--steps", type=int, default=200)
    args = words.parse_args()
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
    inputs = torch.randn(2000, 8)
    data = torch.utils.data.TensorDataset(inputs, inputs.square().mean(dim=1, keepdim=True))
    model = nn.Sequential(nn.Linear(8, 128), nn.GELU(), nn.Dropout(0.05), nn.Linear(128, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=800)
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    with AcceleratedSession(accelerator, args.run, model, optimizer, scheduler=scheduler) as session:  # outlast
        for x, y in session.batches(loader, args.steps):  # outlast
            with accelerator.accumulate(model):
                loss = mse_loss(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            session.log(loss=loss)
            if session.done_step % 50 == 49 and accelerator.sync_gradients:
                accelerator.print(f"loss {loss.item():.3f} after step {session.done_step + 1}")


if __name__ == "__main__":
    main()
