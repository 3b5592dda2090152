"""Optimizer, schedule, generators, run directories: what is saved goes on as if nothing had happened."""

from __future__ import annotations

import json
import random
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from outlast.checkpoint.rng import load_rng_state, rng_state
from outlast.config import load, split_overrides, to_toml
from outlast.errors import RunDirectoryError
from outlast.launch.attempt import Attempt
from outlast.launch.run_directory import is_used
from outlast.trainer.config import Config, ModelConfig, OptimConfig
from outlast.trainer.model import GPT
from outlast.trainer.optim import (
    build_optimizer,
    build_scheduler,
    load_optimizer_state,
    load_scheduler_state,
    lr_share,
    optimizer_state,
)
from outlast.trainer.run_directory import run_directory

SMALL = ModelConfig(layers=1, heads=2, width=8, context=8)


def test_the_schedule_rises_then_falls() -> None:
    config = OptimConfig(warmup_steps=10, min_lr_share=0.1)
    shares = [lr_share(index, config, steps=100) for index in range(100)]
    assert shares[:10] == [pytest.approx((i + 1) / 10) for i in range(10)]
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert lr_share(100, config, steps=100) == pytest.approx(0.1)


def test_optimizer_and_schedule_go_on_where_they_were() -> None:
    config = OptimConfig(warmup_steps=3)
    tokens = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))

    def steps(
        model: GPT, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LambdaLR, count: int
    ) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.step()
            scheduler.step()

    def fresh() -> tuple[GPT, torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        model = GPT(SMALL)
        optimizer = build_optimizer(model, config)
        return model, optimizer, build_scheduler(optimizer, config, 20)

    straight, first = fresh(), fresh()
    steps(*straight, 10)
    steps(*first, 4)
    saved_scheduler = json.loads(json.dumps(first[2].state_dict()))
    saved_optimizer = {n: {k: v.clone() for k, v in s.items()} for n, s in optimizer_state(first[0], first[1]).items()}
    second = fresh()
    second[0].load_state_dict(first[0].state_dict())
    load_optimizer_state(second[0], second[1], saved_optimizer)
    load_scheduler_state(second[2], saved_scheduler)
    steps(*second, 6)
    for a, b in zip(straight[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_matrices_are_decayed() -> None:
    optimizer = build_optimizer(GPT(SMALL), OptimConfig(weight_decay=0.3))
    for group in optimizer.param_groups:
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] == 0.3}


def test_generators_go_on_where_they_were() -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(0, 1), float(np.random.standard_normal()), float(torch.rand(()))

    draw()
    saved = rng_state()
    expected = [draw() for _ in range(5)]
    load_rng_state(saved)
    assert [draw() for _ in range(5)] == expected


def settings(run: Path, *words: str) -> Config:
    return load(Config, None, {}, split_overrides(["--run.dir", str(run), *words])[1])


def begin(stack: ExitStack, config: Config, *, resuming: bool) -> Attempt:
    return run_directory(config).claim(stack, resuming=resuming, settings=to_toml(config))


def test_attempts_are_numbered_and_latest_links_to_the_newest(tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    assert not is_used(run)
    with ExitStack() as first:
        assert begin(first, settings(run), resuming=False).number == 1
        assert is_used(run)
        with pytest.raises(RunDirectoryError, match="already contains a run"):
            begin(first, settings(run), resuming=False)
    with ExitStack() as again:
        second = begin(again, settings(run, "--trainer.steps", "7"), resuming=True)
        assert second.number == 2
    assert (run / "attempts" / "latest").resolve() == second.path
    assert load(Config, run / "config.toml", {}).trainer.steps == 100
    assert load(Config, second.path / "config.toml", {}).trainer.steps == 7
    assert sorted(p.name for p in run.iterdir()) == ["attempts", "config.toml"]
