"""What is sent and not applied is not lost: over steps, what was applied and what is held back is what was put in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from outlast.comm import CommConfig, GradientReducer, attach
from outlast.comm.slices import slices
from tests.comm.ranks import Ranks

SHAPES = {"left": (40, 30), "right": (25, 40), "bias": (50,), "rare": (30, 21)}
COMM: dict[str, Any] = {"target": "gradient", "density": 0.05, "dense_below": 100, "resync_every_steps": 0}
Uses = list[list[list[bool]]]
"""Whether [step][rank] uses [parameter]."""


class Branches(nn.Module):
    """Each parameter is a branch of its own, which a step takes or does not."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        return sum(((getattr(self, name) * g).sum() for name, g in wanted.items()), torch.zeros(()))


def gradients(step: int, rank: int, uses: Uses) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: drawn[name] for name, used in zip(SHAPES, uses[step][rank], strict=True) if used}


def full(x: Tensor) -> np.ndarray[Any, Any]:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().double().numpy().copy()


def run(rank: int, adapter: str, comm: dict[str, Any], uses: Uses) -> dict[str, Any]:
    """Applied, by parameter and summed over steps; the last estimate; and the state."""
    model = Branches()
    config = CommConfig(**COMM, **comm)
    if adapter == "ddp":
        step_model: nn.Module = DistributedDataParallel(model, find_unused_parameters=True, bucket_cap_mb=0.003)
        reducer = attach(step_model, config)
    elif adapter == "fsdp":
        step_model = fully_shard(model)  # type: ignore[assignment]
        reducer = attach(step_model, config)
    else:
        step_model, reducer = model, GradientReducer(model.named_parameters(), config)
    applied = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    last: dict[str, Any] = {}
    for step in range(len(uses)):
        step_model.zero_grad()
        step_model(gradients(step, rank, uses)).backward()
        if isinstance(reducer, GradientReducer) and adapter == "reduce":
            reducer.reduce()
        for name, param in model.named_parameters():
            if param.grad is not None:
                last[name] = full(param.grad)
                applied[name] += last[name]
    state = reducer.state_dict()
    slots = {
        part: {name: {k: full(v) for k, v in d.items()} for name, d in state[part].items()}
        for part in state
        if part != "meta"
    }
    reducer.close()
    return {"applied": applied, "last": last, **slots}


def drawn_uses(steps: int, ranks: int = 3) -> st.SearchStrategy[Uses]:
    """The bias is always used: DDP itself waits for ever for a rank that uses nothing."""
    one = st.tuples(st.booleans(), st.booleans(), st.just(True), st.booleans()).map(list)
    return st.lists(st.lists(one, min_size=ranks, max_size=ranks), min_size=steps, max_size=steps)


def put_in(uses: Uses, ranks: int) -> dict[str, np.ndarray[Any, Any]]:
    total = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(len(uses)):
        for rank in range(ranks):
            for name, g in gradients(step, rank, uses).items():
                total[name] += g.double().numpy()
    return total


def held_back(found: list[dict[str, Any]], name: str) -> np.ndarray[Any, Any]:
    """The sum over ranks of what memories hold; what an owner keeps is of a mean."""
    n = len(found)
    total = np.zeros(SHAPES[name])
    for rank, one in enumerate(found):
        slots = one["local"].get(name, {})
        if "e" in slots:
            total += slots["e"]
        if "owned_s" in slots:
            rows = slices(torch.from_numpy(total), n)[rank]
            rows += n * torch.from_numpy(slots["owned_s"])
    return total


METHODS = st.sampled_from(
    [
        ("ddp", {"feedback": "ef14"}),
        ("ddp", {"feedback": "ef14", "values": "fp32", "warmup_steps": 2}),
        ("ddp", {"feedback": "ef14", "compressor": "sign"}),
        ("ddp", {"feedback": "ef14", "compressor": "lowrank", "rank": 2}),
        ("ddp", {"feedback": "ef14", "transport": "two-phase"}),
        ("ddp", {"feedback": "econtrol"}),
        ("reduce", {"feedback": "ef14"}),
        ("reduce", {"feedback": "econtrol"}),
        ("reduce", {"feedback": "ef14", "transport": "two-phase"}),
        ("fsdp", {"feedback": "ef14"}),
    ]
)


@settings(max_examples=14, phases=[Phase.generate])
@given(method=METHODS, uses=drawn_uses(4))
def check_mass(ranks: Ranks, method: tuple[str, dict[str, Any]], uses: Uses) -> None:
    found = ranks.run(run, *method, uses)
    total = put_in(uses, 3)
    for name in SHAPES:
        for one in found:
            np.testing.assert_array_equal(one["applied"][name], found[0]["applied"][name])
        balance = 3 * found[0]["applied"][name] + held_back(found, name)
        np.testing.assert_allclose(balance, total[name], atol=2e-5 * len(uses), err_msg=name)


def test_nothing_is_lost(three_ranks: Ranks) -> None:
    check_mass(three_ranks)


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Ranks]:
    """Two nodes of two ranks."""
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def held_by_nodes(found: list[dict[str, Any]], name: str) -> np.ndarray[Any, Any]:
    """A rank holds what its node's mean lost of its own rows; what an owner keeps is of a mean over nodes."""
    total = np.zeros(SHAPES[name])
    for rank, one in enumerate(found):
        slots = one["local"].get(name, {})
        rows = slices(torch.from_numpy(total), 2)[rank % 2]
        if "e" in slots:
            rows += 2 * torch.from_numpy(slots["e"]).reshape(rows.shape)
        if "owned_s" in slots:
            part = slices(rows, 2)[rank // 2]
            part += 4 * torch.from_numpy(slots["owned_s"]).reshape(part.shape)
    return total


@settings(max_examples=6, phases=[Phase.generate])
@given(
    method=st.sampled_from(
        [
            {"feedback": "ef14"},
            {"feedback": "ef14", "transport": "two-phase"},
            {"feedback": "econtrol"},
        ]
    ),
    uses=drawn_uses(4, ranks=4),
)
def check_nodes(ranks: Ranks, method: dict[str, Any], uses: Uses) -> None:
    found = ranks.run(run, "ddp", {**method, "ranks_per_node": 2}, uses)
    total = put_in(uses, 4)
    for name in SHAPES:
        for one in found:
            np.testing.assert_array_equal(one["applied"][name], found[0]["applied"][name])
        balance = 4 * found[0]["applied"][name] + held_by_nodes(found, name)
        np.testing.assert_allclose(balance, total[name], atol=4e-5 * len(uses), err_msg=name)


def test_nothing_is_lost_between_nodes(two_nodes: Ranks) -> None:
    check_nodes(two_nodes)


@settings(max_examples=6, phases=[Phase.generate])
@given(feedback=st.sampled_from(["ef21", "ef21-sgdm", "econtrol"]), uses=drawn_uses(4))
def check_trackers(ranks: Ranks, feedback: str, uses: Uses) -> None:
    found = ranks.run(run, "ddp", {"feedback": feedback}, uses)
    for name in ("left", "right", "rare"):
        if not any(used for step in uses for rank in step for n, used in zip(SHAPES, rank, strict=True) if n == name):
            assert all(name not in one["local"] for one in found)
            continue
        mean = sum(one["local"][name]["h_i"] for one in found) / 3
        for one in found:
            np.testing.assert_allclose(one["replicated"][name]["h"], mean, atol=1e-5)
            np.testing.assert_array_equal(one["last"][name], one["replicated"][name]["h"])


def test_a_tracker_follows_what_was_applied(three_ranks: Ranks) -> None:
    check_trackers(three_ranks)


def run_pausing(rank: int, settings: dict[str, Any], static: bool) -> Any:
    """The second step uses no branch but one; the state of the others stays, to the bit, and .grad alone."""
    model = Branches()
    ddp = DistributedDataParallel(model, find_unused_parameters=not static, static_graph=static, bucket_cap_mb=0.003)
    reducer = attach(ddp, CommConfig(**COMM, **settings))
    always = [[[True, False, True, False]] * 3] * 4 if static else [[[True] * 4] * 3, [[True, False, True, False]] * 3]
    for step in range(len(always)):
        before = {name: {k: v.clone() for k, v in d.items()} for name, d in reducer.state_dict()["local"].items()}
        ddp.zero_grad()
        ddp(gradients(step, rank, always)).backward()
    state = reducer.state_dict()
    for name in ("right", "rare"):
        assert getattr(model, name).grad is None
        now = state["local"].get(name, {})
        assert set(now) == set(before.get(name, {}))
        assert all(torch.equal(now[slot], before[name][slot]) for slot in now)
    assert not torch.equal(
        state["local"]["left"]["e" if settings["feedback"] == "ef14" else "h_i"], torch.zeros(40, 30)
    )
    again = GradientReducer(Branches().named_parameters(), reducer.config)
    again.load_state_dict(state)  # what no rank ever used may be missing
    assert again.state_dict()["meta"] == state["meta"]
    again.close()
    reducer.close()
    return state["meta"]["unused"]


def test_what_no_rank_uses_takes_no_part(three_ranks: Ranks) -> None:
    for feedback in ("ef14", "ef21", "econtrol"):
        assert three_ranks.run(run_pausing, {"feedback": feedback}, False) == [[]] * 3
    assert three_ranks.run(run_pausing, {"feedback": "ef14", "transport": "two-phase"}, False) == [[]] * 3
    assert three_ranks.run(run_pausing, {"feedback": "ef14"}, True) == [["right", "rare"]] * 3
