"""FSDP2 over slow links: sharded parameters, AdamW, compressed gradients, exact resume; what outlast adds is marked.

    torchrun --standalone --nproc-per-node 2 examples/fsdp_loop.py runs/fsdp_loop

Stop it whenever you like and start it again: it goes on from the newest complete checkpoint, bit for bit.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import outlast  # outlast


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (64, 32) and y (64, 1), a function of step and rank: nothing of the data has to be saved."""
    random = torch.Generator().manual_seed(step * 1009 + rank)
    x = torch.randn(64, 32, generator=random)
    return x, x.square().mean(dim=1, keepdim=True)


def main() -> None:
    """Train for ``--steps`` steps, over all starts together."""
    words = argparse.ArgumentParser()
    words.add_argument("run")
    words.add_argument("--steps", type=int, default=200)
    args = words.parse_args()

    dist.init_process_group("gloo")  # "nccl" with GPUs
    torch.manual_seed(0)
    layers = [nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Dropout(0.01), nn.Linear(256, 1)]
    model = nn.Sequential(*layers)
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    with outlast.Session(args.run, model, optimizer, comm={"density": 0.05}) as session:  # outlast
        torch.manual_seed(1 + session.rank)  # equal weights so far; from here on each rank drops entries of its own
        for step in session.steps(args.steps):  # outlast
            x, y = batch(step, session.rank)
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log(loss=loss)  # outlast
            if session.rank == 0 and step % 20 == 0:
                print(f"step {step}: loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
