"""Error-feedback state on another number of ranks, and its drift: real ranks, 4 -> 3 -> 5."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from outlast.comm import CommConfig, GradientReducer, ReduceStats
from outlast.errors import CommStateMismatch
from tests.comm.ddp.test_resume import copied
from tests.comm.ranks import Ranks
from tests.comm.toy import CONFIG, SHAPES, Toy, gradients

RATE = 0.01
"""Small enough for ef21 in two phases, whose estimate lags most."""


def train(rank: int, settings: dict[str, Any], saved: list[Any], first: int, last: int) -> Any:
    """Steps ``first`` to ``last``, from the states of all ranks of another run; the state, loss and last estimates.

    The loss is that of a quadratic whose gradients are the distance to a point, so that there is something to learn.
    """
    model = Toy()
    if saved:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(saved[0]["model"][name])
    reducer = GradientReducer(model.named_parameters(), CommConfig(**{**CONFIG, "target": "gradient", **settings}))
    if saved:
        reducer.load_resharded(lambda old: saved[old]["comm"], len(saved))
    losses = []
    target = gradients(0, 0)
    for step in range(first, last + 1):
        noise = gradients(step, rank)
        loss = 0.0
        for name, parameter in model.named_parameters():
            off = parameter.detach() - target[name]
            loss += float(off.square().sum())
            parameter.grad = off + 0.1 * noise[name]
        reducer.begin_step(step)
        reducer.reduce()
        stats: ReduceStats = reducer.end_step()
        losses.append(loss)
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= RATE * parameter.grad
    state = copied(reducer.state_dict())
    reducer.close()
    held = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {"comm": state, "model": held, "losses": losses, "drift": stats.drift}


def exchanged(rank: int, settings: dict[str, Any], saved: list[Any]) -> Any:
    """The state as it is taken over, before a step."""
    model = Toy()
    reducer = GradientReducer(model.named_parameters(), CommConfig(**{**CONFIG, "target": "gradient", **settings}))
    reducer.load_resharded(lambda old: saved[old]["comm"], len(saved))
    state = copied(reducer.state_dict())
    reducer.close()
    return state


@pytest.fixture(scope="module")
def worlds() -> Any:
    made = {n: Ranks(n) for n in (4, 3, 5)}  # each starts when it is first used
    yield made
    for ranks in made.values():
        ranks.close()


SETTINGS: list[dict[str, Any]] = [
    {"feedback": "ef14"},
    {"feedback": "ef14", "residual": "int8"},
    {"feedback": "ef14", "transport": "two-phase"},
    {"feedback": "ef21"},
    {"feedback": "ef21", "transport": "two-phase"},
    {"feedback": "econtrol"},
    {"feedback": "ef21-sgdm"},
    {"feedback": "ef14", "target": "update"},
    {"feedback": "ef14", "compressor": "lowrank", "rank": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_four_then_three_then_five(worlds: dict[int, Ranks], settings: dict[str, Any]) -> None:
    runs = {4: worlds[4].run(train, settings, [], 1, 20)}
    jumps = []
    for before, after, first in ((4, 3, 21), (3, 5, 41)):
        old, new = runs[before], worlds[after].run(exchanged, settings, runs[before])
        for slot, keeps in (("e", "sum over ranks / ranks"), ("h_i", "mean"), ("v", "mean")):
            for name in SHAPES:
                if slot not in old[0]["comm"]["local"].get(name, {}) or settings.get("residual") == "int8":
                    continue
                was = torch.stack([one["comm"]["local"][name][slot].double() for one in old]).mean(0)
                now = torch.stack([one["local"][name][slot].double() for one in new]).mean(0)
                off = (now - was).norm() / was.norm().clamp(min=1e-30)
                assert off < 1e-6, f"{slot} of {name}: the {keeps} moved by {off:.1e}"
        runs[after] = worlds[after].run(train, settings, runs[before], first, first + 19)
        assert all(one["losses"] == runs[after][0]["losses"] for one in runs[after]), "ranks differ"
        jumps.append(runs[after][0]["losses"][0] / old[0]["losses"][-1])
    losses = [loss for n in (4, 3, 5) for loss in runs[n][0]["losses"]]
    assert all(after < 1.01 * before for before, after in itertools.pairwise(losses)), losses
    assert losses[-1] < 0.9 * losses[0]
    assert all(0.9 < jump < 1.01 for jump in jumps)


@pytest.mark.slow
def test_what_nodes_share_is_not_redistributed(worlds: dict[int, Ranks]) -> None:
    saved = worlds[4].run(train, {"feedback": "ef14", "ranks_per_node": 2}, [], 1, 2)
    for said in worlds[3].run(refused, saved):
        assert "ranks_per_node = 2 cannot be redistributed over 3 ranks" in said


def refused(rank: int, saved: list[Any]) -> str:
    with pytest.raises(CommStateMismatch) as caught:
        exchanged(rank, {"feedback": "ef14"}, saved)
    return caught.value.what


@pytest.mark.parametrize("transport", ["all-gather", "two-phase"])
def test_drift_is_measured_and_taken_away(worlds: dict[int, Ranks], transport: str) -> None:
    settings = {"feedback": "ef21", "transport": transport, "resync_every_steps": 10}
    drifts = {one["drift"] for one in worlds[3].run(train, settings, [], 1, 10)}
    assert len(drifts) == 1
    (drift,) = drifts
    assert 0 < drift < 1e-5, "rounding, and nothing more"
    saved = worlds[3].run(train, {**settings, "resync_every_steps": 10}, [], 1, 10)
    if transport == "all-gather":
        local = [one["comm"]["local"]["wide"]["h_i"] for one in saved]
        h = saved[0]["comm"]["replicated"]["wide"]["h"]
        assert h.shape == local[0].shape
    assert worlds[3].run(twice, settings) == [0.0] * 3


def twice(rank: int, settings: dict[str, Any]) -> float:
    """The drift right after a resync."""
    model = Toy()
    reducer = GradientReducer(model.named_parameters(), CommConfig(**{**CONFIG, "target": "gradient", **settings}))
    for step in (1, 2, 3):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients(step, dist.get_rank())[name]
        reducer.reduce()
    reducer.resync()
    again = reducer.resync()
    reducer.close()
    return again
