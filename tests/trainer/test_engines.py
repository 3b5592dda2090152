"""Engines on real ranks: what they save goes on, on as many ranks or on others, and their updates are those of DDP."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import outlast.checkpoint
from outlast.config import load, split_overrides
from outlast.errors import CommStateMismatch, ConfigError, OutlastError, StateMismatch
from outlast.trainer.blocks import blocks_of
from outlast.trainer.config import Config
from outlast.trainer.engines.build import build_engine
from tests.comm.ranks import Ranks

CPU = torch.device("cpu")
DENSE = ["--comm.compressor", "dense"]
GRADIENTS = ["--comm.target", "gradient", "--comm.feedback", "ef21", "--comm.density", "0.1", "--comm.dense_below", "8"]
UPDATES = ["--comm.density", "0.1", "--comm.dense_below", "8"]
FSDP2 = ["--trainer.engine", "fsdp2"]


class Net(nn.Module):
    """Two blocks, buffers, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.head = nn.Linear(12, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(()))  # another one on each rank

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.mean += x.detach().mean()
        for block in self.blocks:
            x = block(x).relu()
        return nn.functional.mse_loss(self.head(x), y)


def settings(*words: str) -> Config:
    return load(Config, None, {}, split_overrides(["--optim.warmup_steps", "0", "--trainer.steps", "9", *words])[1])


def batches(step: int, rank: int, ranks: int, accumulate: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's part of the 16 samples of a step."""
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
    pairs = x.chunk(ranks)[rank].chunk(accumulate)
    return [(part, part.square().mean(dim=1, keepdim=True)) for part in pairs]


def train(
    rank: int, folder: str, first: int, last: int, words: list[str], accumulate: int = 1
) -> tuple[dict[str, Tensor], dict[str, Any], list[float | None]]:
    """Steps ``first`` to ``last``, after a checkpoint if ``first`` is not 1; returns whole parameters, whole optimizer
    state and the norms."""
    ranks = dist.get_world_size()
    torch.manual_seed(3)
    engine = build_engine(Net(), settings(*words), CPU)
    norms = []
    try:
        with outlast.checkpoint.attach(folder) as checkpointer:
            if first > 1:
                like = engine.like()
                strict: Any = True if like is None else ("model",)
                restored = checkpointer.restore(first - 1, like=like, any_world_size=True, strict=strict)
                assert restored is not None
                engine.load(restored)
            for step in range(first, last + 1):
                engine.forward_backward(step, batches(step, rank, ranks, accumulate))
                checkpointer.wait_copied()
                stats = engine.update(step)
                norms.append(stats.grad_norm)
                state = engine.state()
                local = {"own": {"rank": rank}, **state.local}
                checkpointer.save(step, replicated=state.replicated, local=local, eager=state.eager)
            engine.evaluate(batches(99, rank, ranks, 1))
            state = engine.state()
            found = weights(engine.model), whole(state.replicated.get("optimizer", {}))
    finally:
        engine.close()
    return *found, norms


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole parameters and buffers, wherever the shards are."""
    gathered: Any = contextlib.nullcontext()
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        gathered = import_module("deepspeed").zero.GatheredParameters(list(model.parameters()))
    with gathered:
        found: dict[str, Tensor] = whole(dict(model.named_parameters()) | dict(model.named_buffers()))
    return found


def whole(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, DTensor):
        state = state.full_tensor()
    return state.detach().clone() if isinstance(state, Tensor) else state


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[int, Ranks]]:
    made = {size: Ranks(size) for size in (2, 4)}
    yield made
    for world in made.values():
        world.close()


def assert_close(one: Any, other: Any, **limits: float) -> None:
    torch.testing.assert_close(one, other, **(limits or {"rtol": 0.0, "atol": 0.0}))


@pytest.mark.parametrize("words", [DENSE, GRADIENTS, UPDATES], ids=["dense", "gradients", "updates"])
def test_fsdp2_goes_on_bit_for_bit(worlds: dict[int, Ranks], tmp_path: Path, words: list[str]) -> None:
    straight = worlds[2].run(train, str(tmp_path / "straight"), 1, 5, [*FSDP2, *words])
    worlds[2].run(train, str(tmp_path / "halves"), 1, 3, [*FSDP2, *words])
    resumed = worlds[2].run(train, str(tmp_path / "halves"), 4, 5, [*FSDP2, *words])
    for one, other in zip(straight, resumed, strict=True):
        assert_close(one[:2], other[:2])
    assert float(straight[0][0]["calls"]) == 5


def test_dense_fsdp2_is_ddp_and_goes_on_anywhere(worlds: dict[int, Ranks], tmp_path: Path) -> None:
    """4 ranks under DDP, then 2 under FSDP2, then 4 as two copies of two shards: the same but for rounding."""
    straight = worlds[2].run(train, str(tmp_path / "straight"), 1, 6, DENSE)[0]
    folder = str(tmp_path / "moved")
    worlds[4].run(train, folder, 1, 2, DENSE)
    worlds[2].run(train, folder, 3, 4, [*FSDP2, *DENSE], 2)
    moved = worlds[4].run(train, folder, 5, 6, [*FSDP2, *DENSE, "--fsdp.mesh", "2,2"])[0]
    for name in ("calls", "mean"):  # count micro-batches
        moved[0].pop(name), straight[0].pop(name)
    assert_close(moved[:2], straight[:2], rtol=1e-4, atol=1e-6)
    assert moved[2] == pytest.approx(straight[2][4:], rel=1e-4)
    back = worlds[2].run(train, folder, 7, 7, DENSE)[0]
    assert back[2][0] == pytest.approx(straight[2][5], rel=1.0)


def test_sharded_error_feedback_stays_with_its_number_of_ranks(worlds: dict[int, Ranks], tmp_path: Path) -> None:
    worlds[4].run(train, str(tmp_path / "a"), 1, 2, [*FSDP2, *GRADIENTS])
    worlds[2].run(refused, str(tmp_path / "a"), [*FSDP2, *GRADIENTS], CommStateMismatch, "FSDP2", "4")
    worlds[4].run(train, str(tmp_path / "b"), 1, 2, [*FSDP2, *DENSE])
    worlds[4].run(refused, str(tmp_path / "b"), [*FSDP2, *GRADIENTS], StateMismatch, "dense gradients")
    worlds[4].run(refused, str(tmp_path / "b"), GRADIENTS, StateMismatch, "no state of error feedback")


def refused(rank: int, folder: str, words: list[str], error: type[OutlastError], *says: str) -> None:
    with pytest.raises(error) as caught:
        train(rank, folder, 3, 3, words)
    assert all(text in str(caught.value) for text in says), caught.value


def wrong(rank: int) -> None:
    with pytest.raises(ConfigError, match=r"fsdp\.mesh = \[4, 2\] is of 8 ranks, and there are 2"):
        build_engine(Net(), settings(*FSDP2, *DENSE, "--fsdp.mesh", "4,2"), CPU)
    with pytest.raises(ConfigError, match="no module of class 'Liner'") as caught:
        build_engine(Net(), settings(*FSDP2, *DENSE, "--fsdp.blocks", "Liner"), CPU)
    assert "did you mean 'Linear'?" in str(caught.value)
    with pytest.raises(OutlastError, match="auto"):
        build_engine(Net(), settings(*FSDP2, "--comm.compressor", "auto"), CPU)
    engine = build_engine(Net(), settings(*FSDP2, *DENSE), CPU)
    before = whole(engine.state().replicated["model"])
    assert set(engine.like()["optimizer"]) == {name for name in before if name not in ("calls", "mean")}
    assert engine.state().replicated["optimizer"] == {}
    assert_close(whole(engine.state().replicated["model"]), before)
    assert all(parameter.grad is None for parameter in engine.model.parameters())


def test_what_fsdp2_cannot_do_is_named_and_asking_changes_nothing(worlds: dict[int, Ranks]) -> None:
    worlds[2].run(wrong)


class TwoHeads(Net):
    """Uses one of two heads, by the step."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(12, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.head, self.other = self.other, self.head
        return super().forward(x, y)


def uses_a_part(rank: int) -> None:
    for comm in (DENSE, GRADIENTS):
        engine = build_engine(TwoHeads(), settings(*comm, "--trainer.find_unused_parameters", "true"), CPU)
        try:
            for step in range(1, 5):
                engine.forward_backward(step, batches(step, rank, 2, 1))
                engine.update(step)
        finally:
            engine.close()


def test_a_loss_may_leave_parameters_out_under_ddp(worlds: dict[int, Ranks]) -> None:
    worlds[2].run(uses_a_part)


def test_blocks_are_the_outermost_of_their_kind() -> None:
    inner = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])
    layers = nn.ModuleList([nn.ModuleDict({"inner": inner}), nn.Linear(2, 2)])
    model = nn.ModuleDict({"layers": layers, "head": nn.Linear(2, 1)})
    assert blocks_of(model) == [model["layers"][0], model["layers"][1]]
    assert blocks_of(model, ["Linear"]) == [inner[0], model["layers"][1], model["head"]]
    assert blocks_of(nn.Linear(2, 2)) == []
