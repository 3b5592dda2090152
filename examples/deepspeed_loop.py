"""DeepSpeed ZeRO 2 over slow links, its gradients averaged by outlast.

    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/deepspeed_loop.py

DeepSpeed's own checkpoint does not hold the error feedback: save ``reducer.checkpoint_parts()`` beside it, as
``examples/own_loop.py`` does.
"""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import outlast.comm

STEPS = 100
SETTINGS = {
    "train_micro_batch_size_per_gpu": 64,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.0,  # DeepSpeed's default is 1, and what Adam would do is not to be clipped
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
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, weight_decay=0.01)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=SETTINGS)
    # What is averaged is the direction that Adam would take, so the optimizer is SGD.
    with outlast.comm.attach(engine, target="update", density=0.05, dense_below=1024, warmup_steps=10) as reducer:
        for step in range(1, STEPS + 1):
            for micro in range(engine.gradient_accumulation_steps()):
                x, y = batch(step, micro, rank)
                loss = nn.functional.mse_loss(engine(x), y)
                engine.backward(loss)
                engine.step()
            stats = reducer.end_step()
            if rank == 0 and step % 20 == 0:
                sent = f"{stats.wire_bytes / 1e3:.1f} kB of gradients sent, dense {stats.dense_bytes / 1e3:.1f} kB"
                print(f"step {step}: loss {loss.item():.4f}, {sent}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
