"""Error-feedback state after parameters were ignored or thawed: refused by name, or taken for the others."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from outlast.comm import CommConfig, GradientReducer, attach
from outlast.errors import CommStateMismatch
from tests.comm.ranks import Ranks
from tests.comm.toy import CONFIG, FEEDBACKS, Toy, gradients

COMPRESSED = ("wide", "small", "mid", "tall")


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def made(feedback: str, without: Collection[str] = ()) -> tuple[Toy, GradientReducer]:
    model = Toy()
    named = [(name, parameter) for name, parameter in model.named_parameters() if name not in without]
    return model, GradientReducer(named, CommConfig(**{**CONFIG, "feedback": feedback, "dense_below": 50}))


def estimates(model: Toy, reducer: GradientReducer, rank: int, steps: Collection[int]) -> list[dict[str, torch.Tensor]]:
    seen = []
    for step in steps:
        model.zero_grad()
        model(gradients(step, rank)).backward()
        reducer.reduce()
        seen.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return seen


def ignored(rank: int, feedback: str) -> None:
    """Of two parameters that are not exchanged any more the state is left, of the others nothing is lost."""
    model, reducer = made(feedback)
    estimates(model, reducer, rank, (1, 2))
    state = copy.deepcopy(reducer.state_dict())
    expected = estimates(model, reducer, rank, (3, 4))
    reducer.close()
    gone = ("mid", "tall")
    model, reducer = made(feedback, gone)
    with pytest.raises(CommStateMismatch, match="'mid', 'tall': no such compressed parameter") as refused:
        reducer.load_state_dict(state)
    assert "strict=False takes the state of the others" in refused.value.fix
    assert sorted(reducer.load_state_dict(state, strict=False)) == ["mid", "tall"]
    for seen, right in zip(estimates(model, reducer, rank, (3, 4)), expected, strict=True):
        assert all(torch.equal(seen[name], right[name]) for name in right if name not in gone)
    reducer.close()


def thawed(rank: int, feedback: str) -> None:
    """A parameter without state begins as at the first step; the others go on."""
    model, reducer = made(feedback, ("mid",))
    estimates(model, reducer, rank, (1, 2))
    state = copy.deepcopy(reducer.state_dict())
    expected = estimates(model, reducer, rank, (3, 4))
    reducer.close()
    model, reducer = made(feedback)
    with pytest.raises(CommStateMismatch, match="'mid' is missing") as refused:
        reducer.load_state_dict(state)
    assert "strict=False" in refused.value.fix
    assert reducer.load_state_dict(state, strict=False) == ("mid",)
    seen = estimates(model, reducer, rank, (3, 4))
    reducer.close()
    for one, other in zip(seen, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other if name != "mid")
    model, reducer = made(feedback)
    fresh = estimates(model, reducer, rank, (3, 4))
    reducer.close()
    assert all(torch.equal(one["mid"], other["mid"]) for one, other in zip(seen, fresh, strict=True))


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("case", [ignored, thawed])
def test_what_is_left_is_named(two_ranks: Ranks, case: Any, feedback: str) -> None:
    two_ranks.run(case, feedback)


def saved(rank: int, feedback: str) -> Any:
    model, reducer = made(feedback)
    estimates(model, reducer, rank, (1, 2))
    state = copy.deepcopy(reducer.state_dict())
    reducer.close()
    return state


def resharded(rank: int, feedback: str, states: list[Any]) -> None:
    model, reducer = made(feedback, ("mid",))
    with pytest.raises(CommStateMismatch, match="'mid': no such compressed parameter"):
        reducer.load_resharded(lambda saved_by: states[saved_by], 3)
    assert reducer.load_resharded(lambda saved_by: states[saved_by], 3, strict=False) == ("mid",)
    estimates(model, reducer, rank, (3,))
    reducer.close()


@pytest.mark.parametrize("feedback", ["ef14", "ef21"])
def test_other_ranks(three_ranks: Ranks, two_ranks: Ranks, feedback: str) -> None:
    two_ranks.run(resharded, feedback, three_ranks.run(saved, feedback))


def another_shape(rank: int) -> None:
    model, reducer = made("ef21")
    estimates(model, reducer, rank, (1,))
    state = copy.deepcopy(reducer.state_dict())
    state["local"]["small"] = {slot: tensor[:3] for slot, tensor in state["local"]["small"].items()}
    with pytest.raises(CommStateMismatch, match="'small' is"):
        reducer.load_state_dict(state)
    assert reducer.load_state_dict(state, strict=False) == ("small",)
    assert "small" not in reducer.state_dict()["local"]
    reducer.close()


def test_of_another_shape(two_ranks: Ranks) -> None:
    two_ranks.run(another_shape)


def sharded(rank: int) -> None:
    """FSDP2: a layer that was frozen when the state was saved is trained now."""

    def start(frozen: bool) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
        model[1].requires_grad_(not frozen)
        mesh = init_device_mesh("cpu", (2,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        config = CommConfig(target="gradient", feedback="ef21", density=0.1, dense_below=100, transport="two-phase")
        return model, attach(model, config)

    def step(model: nn.Module) -> None:
        model(torch.ones(4, 32) * (rank + 1)).square().mean().backward()

    model, reducer = start(frozen=True)
    reducer.begin_step(1)
    step(model)
    state = copy.deepcopy(reducer.state_dict())
    assert list(state["local"]) == ["0.weight"]
    reducer.close()
    model, reducer = start(frozen=False)
    assert reducer.load_state_dict(state) == ()
    state["local"]["gone.weight"] = state["local"]["0.weight"]
    with pytest.raises(CommStateMismatch, match=r"'gone\.weight': no such compressed parameter"):
        reducer.load_state_dict(state)
    assert reducer.load_state_dict(state, strict=False) == ("gone.weight",)
    reducer.begin_step(2)
    step(model)
    assert sorted(reducer.state_dict()["local"]) == ["0.weight", "1.weight"]
    reducer.close()


def test_under_fsdp2(two_ranks: Ranks) -> None:
    two_ranks.run(sharded)
