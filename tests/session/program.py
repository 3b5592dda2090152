"""A training script with a session: ``program.py RUN [--wrap …] [--do …]``; prints a hash of its end."""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import outlast


class Draws:
    """A data source whose position is its state, and each rank's own."""

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(16, 8, generator=self._random)
        return x, x.square().mean(dim=1, keepdim=True)

    def state_dict(self) -> dict[str, Any]:
        return {"random": self._random.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._random.set_state(state["random"])


def network(width: int = 64) -> nn.Module:
    """With buffers that forward changes, and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, width),
        nn.BatchNorm1d(width),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(width, width),
        nn.Linear(width, 1),
    )


def digest(*models: nn.Module) -> str:
    """Of all parameters and buffers; sharded ones are gathered, on all ranks."""
    found = hashlib.sha256()
    for model in models:
        for _, value in sorted(model.state_dict().items()):
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            found.update(whole.detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def kill_due(folder: Path, rank: int, step: int) -> bool:
    """Whether this rank is to kill itself now: the folder has one file ``STEP-RANK`` for each kill that is left."""
    file = folder / f"{step}-{rank}"
    if not file.exists():
        return False
    file.unlink()
    return True


def main() -> None:
    """Train, and do what was asked for."""
    words = argparse.ArgumentParser()
    words.add_argument("run", type=Path)
    words.add_argument("--steps", type=int, default=24)
    words.add_argument("--every", type=int, default=3)
    words.add_argument("--wrap", default="bare")
    words.add_argument("--kills", type=Path)
    words.add_argument("--do", default="")
    words.add_argument("--at", type=int, default=0)
    words.add_argument("--resume", default="auto")
    words.add_argument("--comm", default="")
    args = words.parse_args()
    net = network()
    if args.wrap in ("ddp", "fsdp2"):
        dist.init_process_group("gloo")
    model: Any = net
    if args.wrap == "ddp":
        model = DistributedDataParallel(net)
    if args.wrap == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(net[0])
        fully_shard(net)
    if args.wrap == "gan":
        model = {"net": net, "critic": nn.Linear(1, 1)}
        optimizer: Any = {name: torch.optim.AdamW(one.parameters(), lr=1e-2) for name, one in model.items()}
        updates = list(optimizer.values())
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        updates = [optimizer]
    scheduler = torch.optim.lr_scheduler.LinearLR(updates[0], total_iters=20)
    average = torch.optim.swa_utils.AveragedModel(net) if args.wrap != "fsdp2" else None
    resume: Any = int(args.resume) if args.resume.isdecimal() else args.resume
    comm: Any = {"": None, "off": False}.get(args.comm, {"compressor": args.comm})
    with outlast.Session(
        args.run, model, optimizer, comm=comm, checkpoint={"every_steps": args.every}, resume=resume
    ) as session:
        torch.manual_seed(session.rank)
        draws = Draws(100 + session.rank)
        session.add(scheduler=scheduler, draws=draws)
        if average is not None:
            session.add(average=average)
        for step in session.steps(args.steps):
            x, y = next(draws)
            if args.wrap == "gan":
                guess = session.model["net"](x)
                loss = session.model["critic"](guess).square().mean() + nn.functional.mse_loss(guess, y)
            else:
                loss = nn.functional.mse_loss(session.model(x), y)
            loss.backward()
            for one in updates:
                one.step()
                one.zero_grad()
            scheduler.step()
            if average is not None:
                average.update_parameters(net)
            session.log(loss=loss, double=2 * loss)
            if args.kills is not None and kill_due(args.kills, session.rank, step):
                os.kill(os.getpid(), signal.SIGKILL)
            if step == args.at:
                if args.do == "notice" and session.rank == session.world_size - 1:
                    os.kill(os.getpid() if "OUTLAST_WATCHED" not in os.environ else os.getppid(), signal.SIGTERM)
                if args.do == "break" or (args.do == "leave" and session.rank == 1):
                    break
                if args.do == "grow":
                    net.append(nn.Linear(1, 1))
                if args.do == "raise":
                    raise ValueError("a batch that cannot be read")
        ends = digest(net)
    if session.rank == 0:
        print(f"end {ends}", flush=True)


if __name__ == "__main__":
    main()
    sys.exit(0)
