"""Under FSDP2 the program keeps its AdamW on the shards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from outlast.comm import attach
from outlast.comm.direction import Adam
from outlast.errors import CommError, CommStateMismatch
from tests.comm.ranks import Ranks

SMALL: dict[str, Any] = {"density": 0.2, "dense_below": 10, "timeout_s": 30.0, "target": "update"}
ADAM: dict[str, Any] = {"betas": (0.9, 0.97), "eps": 1e-7}


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def net(layout: str) -> nn.Module:
    """The last layer has one row, so the second rank has none of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 1))
    if layout == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards")))
    elif layout == "columns":
        fully_shard(
            model, shard_placement_fn=lambda param: Shard(param.dim() - 1) if param.shape[-1] % 2 == 0 else None
        )
    else:
        fully_shard(model[0])
        fully_shard(model)
    return model


def train(model: nn.Module, optimizer: optim.Optimizer, rank: int, steps: range) -> list[Tensor]:
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(2 * step + rank))
        model(x).square().mean().backward()
        optimizer.step()
    return [p.to_local().detach().clone() for p in model.parameters() if isinstance(p, DTensor)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def run_as_sgd(rank: int, layout: str, settings: dict[str, Any], beta1: float) -> None:
    ended = []
    for kept in (True, False):
        model = net(layout)
        groups = [{"params": list(model[0].parameters()), "lr": 3e-2}, {"params": list(model[2:].parameters())}]
        if kept:
            optimizer: optim.Optimizer = optim.AdamW(groups, lr=1e-2, weight_decay=0.1, **ADAM)
            reducer = attach(model, optimizer=optimizer, **{**SMALL, **settings})
        else:
            direction = Adam(beta1=beta1, beta2=0.97, eps=1e-7, clip_rms=1.0)
            reducer = attach(model, direction=direction, **{**SMALL, **settings})
            optimizer = optim.SGD(groups, lr=1e-2, weight_decay=0.1)
        ended.append(train(model, optimizer, rank, range(1, 6)))
        reducer.close()
    assert equal(*ended)


@pytest.mark.parametrize(
    ("layout", "settings", "beta1"),
    [("fsdp", {}, 0.0), ("columns", {}, 0.0), ("hsdp", {}, 0.0), ("fsdp", {"compressor": "dense"}, 0.9)],
)
def test_it_ends_as_sgd_does(two_ranks: Ranks, layout: str, settings: dict[str, Any], beta1: float) -> None:
    two_ranks.run(run_as_sgd, layout, settings, beta1)


def run_state(rank: int, layout: str) -> None:
    """Switched on in the middle, saved, loaded, switched off."""
    model = net(layout)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, **ADAM)
    train(model, optimizer, rank, range(1, 3))
    plain = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    reducer = attach(model, optimizer=optimizer, **SMALL)
    same(plain, get_optimizer_state_dict(model, optimizer), "exp_avg_sq")
    train(model, optimizer, rank, range(3, 4))
    saved, state = copy.deepcopy(get_optimizer_state_dict(model, optimizer)), copy.deepcopy(reducer.state_dict())
    assert {float(one["step"]) for one in saved["state"].values()} == {3.0}
    weights = copy.deepcopy(model.state_dict())
    straight = train(model, optimizer, rank, range(4, 6))
    for first in ("reducer", "optimizer"):  # the reducer's own is exact: the rest of each rank's moments
        for which in ("reducer", "optimizer") if first == "reducer" else ("optimizer", "reducer"):
            if which == "reducer":
                reducer.load_state_dict(state)
            else:
                set_optimizer_state_dict(model, optimizer, copy.deepcopy(saved))
        model.load_state_dict(weights)
        assert equal(straight, train(model, optimizer, rank, range(4, 6))), first
    set_optimizer_state_dict(model, optimizer, copy.deepcopy(plain))  # of a plain AdamW, gathered
    same(plain, get_optimizer_state_dict(model, optimizer), "exp_avg_sq")
    groups = optimizer.state_dict()["param_groups"]
    whole = {0: {slot: torch.zeros(10, 12) for slot in ("step", "exp_avg", "exp_avg_sq")}}
    with pytest.raises(CommStateMismatch, match="is a plain tensor, the parameter is sharded"):
        optimizer.load_state_dict({"state": whole, "param_groups": groups})
    train(model, optimizer, rank, range(3, 4))
    before = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    reducer.close()
    same(before, get_optimizer_state_dict(model, optimizer), "exp_avg_sq", "exp_avg", "step")
    train(model, optimizer, rank, range(5, 6))
    assert {float(one["step"]) for one in optimizer.state_dict()["state"].values()} == {4.0}


def same(one: dict[str, Any], other: dict[str, Any], *slots: str) -> None:
    assert one["state"].keys() == other["state"].keys()
    for name, state in one["state"].items():
        for slot in slots:
            mine, its = (
                x.to_local() if isinstance(x, DTensor) else x for x in (state[slot], other["state"][name][slot])
            )
            assert torch.equal(mine, its), (name, slot)


@pytest.mark.parametrize("layout", ["fsdp", "columns", "hsdp"])
def test_state(two_ranks: Ranks, layout: str) -> None:
    two_ranks.run(run_state, layout)


def run_refused(rank: int) -> None:
    model = net("fsdp")
    optimizer = optim.AdamW(model.parameters(), amsgrad=True)
    with pytest.raises(CommError, match="amsgrad = True"):
        attach(model, optimizer=optimizer, **SMALL)
    with pytest.raises(CommError, match=r"comm\.target = 'gradient'"):
        attach(model, optimizer=optimizer, **{**SMALL, "target": "gradient"})
    train(model, optimizer, rank, range(1, 2))


def test_refused_by_name(two_ranks: Ranks) -> None:
    two_ranks.run(run_refused)
