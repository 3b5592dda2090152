"""A reducer's state, split for a checkpoint in one call and taken back in one, whatever the number of ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import outlast.checkpoint
from outlast.comm import Reducer, attach
from outlast.errors import CommError, CommStateMismatch
from tests.comm.ranks import Ranks

SMALL: dict[str, Any] = {"density": 0.2, "dense_below": 10, "timeout_s": 30.0}
ADAMW: dict[str, Any] = {**SMALL, "target": "update"}
EF21: dict[str, Any] = {**SMALL, "target": "gradient", "feedback": "ef21"}


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[int, Ranks]]:
    ranks = {size: Ranks(size) for size in (1, 2)}
    yield ranks
    for world in ranks.values():
        world.close()


class Job(NamedTuple):
    model: nn.Module
    wrapped: nn.Module
    other: nn.Module
    optimizer: optim.Optimizer
    scheduler: optim.lr_scheduler.LRScheduler
    reducer: Reducer


def job(settings: dict[str, Any], sharded: bool = False) -> Job:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
    torch.manual_seed(0)
    other = nn.Linear(12, 1)
    wrapped: nn.Module = model
    if sharded:
        fully_shard(model)
    else:
        wrapped = DistributedDataParallel(model)
    # What the other module learns is the same on all ranks, and the optimizer's own.
    groups = [{"params": [*model[0].parameters(), *other.parameters()]}, {"params": model[2].parameters(), "lr": 0.1}]
    if sharded:
        groups = [{"params": model.parameters()}]
    optimizer = optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.97))
    scheduler = optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    kept = {"optimizer": optimizer} if settings["target"] == "update" else {}
    return Job(model, wrapped, other, optimizer, scheduler, attach(wrapped, **kept, **settings))


def train(one: Job, rank: int, steps: range) -> list[Tensor]:
    for step in steps:
        one.optimizer.zero_grad()
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(2 * step + rank))
        one.wrapped(x).square().mean().backward()
        one.other(torch.full((1, 12), step / 10)).sum().backward()
        one.optimizer.step()
        one.scheduler.step()
    params = (*one.model.parameters(), *one.other.parameters())
    return [getattr(p, "to_local", lambda p=p: p)().detach().clone() for p in params]


def save(one: Job, url: str, step: int, name: str = "comm") -> None:
    comm = one.reducer.checkpoint_parts(name)
    shared = {"model": one.model.state_dict(), "other": one.other.state_dict(), "scheduler": one.scheduler.state_dict()}
    if one.reducer.kept is None:
        shared["optimizer"] = one.optimizer.state_dict()
    with outlast.checkpoint.attach(url) as checkpointer:
        checkpointer.save(step, replicated={**shared, **comm.replicated}, local=comm.local, eager=comm.eager)


def restore(one: Job, url: str, name: str = "comm") -> tuple[str, ...]:
    with outlast.checkpoint.attach(url) as checkpointer:
        sharded = not isinstance(one.wrapped, DistributedDataParallel)
        like = {"model": one.model.state_dict(), "other": one.other.state_dict()} if sharded else None
        restored = checkpointer.restore("auto", any_world_size=True, like=like, strict=("model",))
        assert restored is not None
        one.model.load_state_dict(restored.replicated["model"])
        one.other.load_state_dict(restored.replicated["other"])
        one.scheduler.load_state_dict(restored.replicated["scheduler"])
        if one.reducer.kept is None:
            one.optimizer.load_state_dict(restored.replicated["optimizer"])
        return one.reducer.load_parts(restored, name=name)


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def run_exact(rank: int, url: str, settings: dict[str, Any], sharded: bool) -> None:
    one = job(settings, sharded)
    train(one, rank, range(1, 4))
    save(one, url, 3, "mine")
    straight = train(one, rank, range(4, 8))
    rates = [group["lr"] for group in one.optimizer.param_groups]
    one.reducer.close()
    again = job(settings, sharded)
    assert restore(again, url, "mine") == ()
    assert equal(straight, train(again, rank, range(4, 8)))
    assert rates == [group["lr"] for group in again.optimizer.param_groups]
    again.reducer.close()


@pytest.mark.parametrize(
    ("settings", "sharded"),
    [
        (ADAMW, False),
        ({**ADAMW, "transport": "two-phase"}, False),
        ({**ADAMW, "compressor": "dense"}, False),
        (EF21, False),
        (ADAMW, True),
    ],
)
def test_it_goes_on_bit_for_bit(
    worlds: dict[int, Ranks], tmp_path: Path, settings: dict[str, Any], sharded: bool
) -> None:
    worlds[2].run(run_exact, str(tmp_path / "a"), settings, sharded)


def run_first(rank: int, url: str, settings: dict[str, Any]) -> None:
    one = job(settings)
    train(one, rank, range(1, 4))
    save(one, url, 3)
    one.reducer.close()


def run_fewer(rank: int, url: str, settings: dict[str, Any]) -> tuple[float, float, list[str]]:
    """What was not sent, in sum over ranks by their number, and the optimizer's rate."""
    one = job(settings)
    assert restore(one, url) == ()
    state = one.reducer.state_dict()
    slot = "e" if settings["target"] == "update" else "h_i"
    total = sum(float(slots[slot].double().sum()) for slots in state["local"].values() if slot in slots)
    rate = float(one.optimizer.param_groups[0]["lr"])
    train(one, rank, range(4, 6))
    return total, rate, sorted(state["local"])


def run_totals(rank: int, url: str, slot: str) -> float:
    with outlast.checkpoint.attach(url) as checkpointer:
        restored = checkpointer.restore("auto", any_world_size=True)
        assert restored is not None
        return sum(
            float(slots[slot].double().sum()) / restored.world_size
            for saved in range(restored.world_size)
            for slots in restored.read_local(saved)["comm"].values()
            if slot in slots
        )


@pytest.mark.parametrize("settings", [ADAMW, EF21])
def test_on_fewer_ranks(worlds: dict[int, Ranks], tmp_path: Path, settings: dict[str, Any]) -> None:
    url = str(tmp_path / "a")
    worlds[2].run(run_first, url, settings)
    kept = worlds[1].run(run_totals, url, "e" if settings["target"] == "update" else "h_i")[0]
    total, rate, names = worlds[1].run(run_fewer, url, settings)[0]
    assert total == pytest.approx(kept, rel=1e-5)
    assert abs(kept) > 1e-6
    assert rate == pytest.approx(1e-2 * (1 / 3 + 2 / 3 * 3 / 10))
    assert names == ["0.weight", "2.weight"]


class Saved(NamedTuple):
    """All that is asked of a checkpoint."""

    replicated: dict[str, Any]
    local: dict[str, Any]
    world_size: int

    def read_local(self, rank: int) -> dict[str, Any]:
        assert rank == dist.get_rank()
        return self.local


def run_others(rank: int) -> None:
    """Other layouts, and what does not fit."""
    one = job(ADAMW)
    train(one, rank, range(1, 3))
    parts = copy.deepcopy(one.reducer.checkpoint_parts())
    earlier = {"comm": copy.deepcopy(one.reducer.state_dict())}
    straight = train(one, rank, range(3, 5))
    began = copy.deepcopy(one.model.state_dict())
    rate = one.optimizer.param_groups[0]["lr"]
    assert straight
    one.reducer.load_parts(Saved({}, earlier, 2))  # local={"comm": reducer.state_dict()}
    assert one.optimizer.param_groups[0]["lr"] == rate
    moments = one.optimizer.state_dict()["state"]
    one.reducer.load_parts(Saved(parts.replicated, parts.local, 2))
    assert one.optimizer.param_groups[0]["lr"] != rate
    for number, state in one.optimizer.state_dict()["state"].items():
        assert number in (2, 3) or torch.equal(state["exp_avg_sq"], moments[number]["exp_avg_sq"])
    with pytest.raises(CommStateMismatch, match="no state of a reducer under 'other'"):
        one.reducer.load_parts(Saved(parts.replicated, parts.local, 2), name="other")
    without_tensors = {"comm": {key: value for key, value in parts.replicated["comm"].items() if key != "aggregate"}}
    with pytest.raises(CommStateMismatch, match="were left out of 'comm'"):
        one.reducer.load_parts(Saved(without_tensors, parts.local, 2))
    for change, said in (
        ({"betas": (0.9, 0.1), "amsgrad": True}, "amsgrad = True"),
        ({"params": [0]}, r"groups of \[1, 2\] parameters, this one of \[4, 2\]"),
    ):
        wrong = copy.deepcopy(parts.replicated)
        wrong["comm"]["optimizer"]["param_groups"][0].update(change)
        before = copy.deepcopy(one.reducer.state_dict())
        with pytest.raises(CommError, match=said):
            one.reducer.load_parts(Saved(wrong, parts.local, 2))
        after = one.reducer.state_dict()
        assert all(
            torch.equal(tensor, after["local"][name][slot])
            for name, slots in before["local"].items()
            for slot, tensor in slots.items()
        )
    one.reducer.close()
    one.model.load_state_dict(began)
    without = attach(DistributedDataParallel(one.model), **ADAMW)
    with pytest.raises(CommStateMismatch, match="groups of an optimizer that the reducer had"):
        without.load_parts(Saved(parts.replicated, parts.local, 2))
    without.close()
    alone = dist.new_group([rank], use_local_synchronization=True)
    part = nn.Linear(12, 12)
    with attach(DistributedDataParallel(part, process_group=alone), **EF21) as reducer:
        saved = reducer.checkpoint_parts()
        with pytest.raises(
            CommStateMismatch, match="saved by 3 ranks, there are 2 now, and this reducer averages over 1"
        ):
            reducer.load_parts(Saved(saved.replicated, saved.local, 3))


def test_other_layouts_and_refusals(worlds: dict[int, Ranks]) -> None:
    worlds[2].run(run_others)
