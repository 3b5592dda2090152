"""A training script with a session and a DeepSpeed engine: ``deepspeed_program.py RUN KILLS``; prints a hash."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

import outlast
from tests.session.program import Draws, digest, kill_due, network

STEPS = 8
COMPRESSED = {"target": "gradient", "feedback": "ef21", "density": 0.05}


def engine_of(stage: int, accumulate: int = 1) -> Any:
    """Each call makes the same engine, with AdamW inside."""
    net = network()
    settings = {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": accumulate,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 1_000_000,
    }
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    return import_module("deepspeed").initialize(model=net, optimizer=optimizer, config=settings)[0]


def weights(engine: Any) -> str:
    """A hash of what the engine has learned, whole, and of this rank's buffers."""
    zero = import_module("deepspeed").zero
    with zero.GatheredParameters(list(engine.module.parameters())):
        return digest(engine.module)


def train(
    run: str | Path,
    last: int,
    stage: int,
    accumulate: int = 1,
    *,
    stop: int = 0,
    notice: int = 0,
    kills: Path | None = None,
    **settings: Any,
) -> str:
    """Steps up to ``last``; a hash of the end.

    Args:
        run: its directory.
        last: number of the last step.
        stage: of ZeRO.
        accumulate: micro-batches of a step.
        stop: the step after whose update all leave the loop.
        notice: the step in which the last rank has a notice.
        kills: see :func:`kill_due`.
        settings: of the session.
    """
    engine = engine_of(stage, accumulate)
    scheduler = torch.optim.lr_scheduler.LinearLR(engine.basic_optimizer, total_iters=8)
    with outlast.Session(run, engine, checkpoint={"every_steps": 2}, **settings) as session:
        assert session.model is engine
        torch.manual_seed(session.rank)  # of dropout
        draws = Draws(100 + session.rank)
        session.add(scheduler=scheduler, draws=draws)
        for step in session.steps(last):
            for _ in range(accumulate):
                x, y = next(draws)
                loss = nn.functional.mse_loss(engine(x), y)
                engine.backward(loss)
                engine.step()
            scheduler.step()
            session.log(loss=loss)
            if kills is not None and kill_due(kills, session.rank, step):
                os.kill(os.getpid(), signal.SIGKILL)
            if step == notice and session.rank == session.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if step == stop:
                break
    return weights(engine)


if __name__ == "__main__":
    end = train(sys.argv[1], STEPS, 2, 2, kills=Path(sys.argv[2]), comm=COMPRESSED)
    print(f"end {end}", flush=True)
