"""DeepSpeed ZeRO 2 over slow links, killed and resumed bit for bit; what outlast adds is marked.

    DS_ACCELERATOR=cpu outlast launch --nproc-per-node 2 examples/deepspeed_loop.py

Stop it whenever you like and start it again: it goes on from the newest complete checkpoint.
"""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import outlast  # outlast

STEPS = 100
SETTINGS = {
    "train_micro_batch_size_per_gpu": 64,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 1_000_000,
}


def batch(step: int, micro: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (64, 32) and y (64, 1)."""
    generator = torch.Generator().manual_seed(step * 1009 + micro * 101 + rank)
    x = torch.randn(64, 32, generator=generator)
    return x, x.square().mean(dim=1, keepdim=True)


def main() -> None:
    """Train for STEPS steps."""
    deepspeed.init_distributed("gloo", verbose=False)
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=SETTINGS)
    with outlast.Session(None, engine) as session:  # outlast: in the launcher's directory, runs/deepspeed_loop
        for step in session.steps(STEPS):  # outlast: in place of range(1, STEPS + 1)
            for micro in range(engine.gradient_accumulation_steps()):  # those of one update in one turn
                x, y = batch(step, micro, rank)
                loss = nn.functional.mse_loss(engine(x), y)
                engine.backward(loss)
                engine.step()
            session.log(loss=loss)  # outlast: for the report
            if rank == 0 and step % 20 == 0:
                print(f"step {step}: loss {loss.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
