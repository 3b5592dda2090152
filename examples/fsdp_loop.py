"""FSDP2 over slow links: compressed gradients, sharded parameters and error feedback in one checkpoint, exact resume.

    torchrun --nproc-per-node 2 examples/fsdp_loop.py runs/fsdp_loop

Stop it whenever you like and start it again: it goes on from the newest complete checkpoint, bit for bit.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import outlast.checkpoint
import outlast.comm
from outlast.checkpoint.rng import load_rng_state, rng_state

STEPS = 200


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (64, 32) and y (64, 1), a function of step and rank: nothing of the data has to be saved."""
    generator = torch.Generator().manual_seed(step * 1009 + rank)
    x = torch.randn(64, 32, generator=generator)
    return x, x.square().mean(dim=1, keepdim=True)


def main(folder: str) -> None:
    """Train for STEPS steps, over all attempts together."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Dropout(0.01), nn.Linear(256, 1)
    )
    torch.manual_seed(1 + rank)  # equal weights so far; from here on each rank drops entries of its own
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    # The optimizer stays; backward() averages the directions in which each rank's Adam would go, compressed.
    settings = {"target": "update", "density": 0.05, "dense_below": 1024, "warmup_steps": 10}
    reducer = outlast.comm.attach(model, optimizer=optimizer, **settings)

    with outlast.checkpoint.attach(folder) as checkpointer:
        first = 1
        if restored := checkpointer.restore("auto", like={"model": model.state_dict()}):  # in parts
            model.load_state_dict(restored.replicated["model"])
            reducer.load_parts(restored)  # error feedback, Adam's moments, the optimizer's groups
            load_rng_state(restored.local["rng"])  # which entries dropout takes next
            first = restored.step + 1
            print(f"rank {rank}: going on from step {restored.step}")

        for step in range(first, STEPS + 1):
            x, y = batch(step, rank)
            optimizer.zero_grad()
            reducer.begin_step(step)
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            stats = reducer.end_step()

            checkpointer.wait_copied()  # the update changes what the last snapshot may still be copying
            optimizer.step()
            if step % 20 == 0:
                comm = reducer.checkpoint_parts()
                checkpointer.save(
                    step,
                    replicated={"model": model.state_dict(), **comm.replicated},
                    local={"rng": rng_state(), **comm.local},
                    eager={"rng", *comm.eager},  # the next forward or backward changes them
                )
                if rank == 0:
                    sent = f"{stats.wire_bytes / 1e3:.1f} kB of gradients sent, dense {stats.dense_bytes / 1e3:.1f} kB"
                    print(f"step {step}: loss {loss.item():.4f}, {sent}")

    reducer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
