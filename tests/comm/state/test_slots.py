"""Names in a state dict stay as they are, so that state of versions before loads; what does not fit is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from outlast.comm.config import CommConfig
from outlast.comm.direction import Adam
from outlast.comm.feedback import Feedback
from outlast.comm.feedback.from_config import feedback_from_config
from outlast.comm.slices import Cut
from outlast.comm.state.parameters import ParameterStates
from outlast.comm.state.sharded_state import ShardedStates
from outlast.comm.state.shards import ShardedParam
from outlast.comm.state.slots import MOMENT, OWNED, prefixed, split
from outlast.errors import CommStateMismatch

CONFIG = CommConfig(compressor="lowrank", feedback="ef21", transport="two-phase", density=0.1, dense_below=2)
FEEDBACK = feedback_from_config(CONFIG)
DIRECTION = Adam()


def whole(seed: int = 0) -> ParameterStates:
    """Two slices, of which this rank owns the first; ``frozen`` never had a gradient."""
    assert isinstance(FEEDBACK, Feedback)
    named = {
        "matrix": torch.zeros(6, 5, requires_grad=True),
        "bias": torch.zeros(3, requires_grad=True),
        "frozen": torch.zeros(4, 4),
    }
    states = ParameterStates(named.items(), CONFIG, FEEDBACK, DIRECTION, units=2)
    if seed:
        torch.manual_seed(seed)
        matrix, bias = states.params["matrix"], states.params["bias"]
        g = matrix.direction_of(DIRECTION, torch.randn(6, 5)).clone()
        matrix.start(FEEDBACK, g)
        matrix.aggregate(FEEDBACK)["h"].normal_()
        matrix.owner_slots(FEEDBACK)["w"].normal_()
        bias.direction_of(DIRECTION, torch.randn(3))
    return states


def sharded(seed: int = 0) -> ShardedStates:
    assert isinstance(FEEDBACK, Feedback)
    states = ShardedStates("fsdp", CONFIG, FEEDBACK, DIRECTION, 2)
    cuts = (Cut(0, 15, (3, 5)), Cut(15, 30, (3, 5)))
    cpu = torch.device("cpu")
    states.params["matrix"] = matrix = ShardedParam("matrix", (6, 5), torch.float32, cpu, True, cuts, 1)
    cuts = (Cut(0, 2, (2,)), Cut(2, 3, (1,)))
    states.params["bias"] = bias = ShardedParam("bias", (3,), torch.float32, cpu, False, cuts, 1)
    if seed:
        torch.manual_seed(seed)
        parts = [matrix.direction_of(DIRECTION, index, torch.randn(3, 5)).clone() for index in range(2)]
        matrix.start(FEEDBACK, parts)
        matrix.owner_slots(FEEDBACK)["h"].normal_()
        bias.direction_of(DIRECTION, 1, torch.randn(1))
    return states


def names(state: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[str]]]:
    return {part: {name: sorted(slots) for name, slots in state[part].items()} for part in ("local", "replicated")}


def test_names_and_meta_of_whole_gradients() -> None:
    state = whole(1).state_dict(7, 2)
    assert names(state)["replicated"] == {"matrix": ["h"], "bias": ["adam_m", "adam_t", "adam_v"]}
    assert set(names(state)["local"]) == {"matrix"}
    assert {"h_i", "owned_w", "adam_m", "adam_t", "adam_v"} < set(names(state)["local"]["matrix"])
    assert state["meta"] == {
        "version": 2,
        "compressor": "lowrank",
        "feedback": "ef21",
        "target": "update",
        "transport": "two-phase",
        "ranks_per_node": 1,
        "world_size": 2,
        "method": {
            "compressor": "lowrank",
            "feedback": "ef21",
            "density": 0.1,
            "values": "int8",
            "rank": 4,
            "block": 0,
            "transport": "two-phase",
        },
        "step": 7,
        "unused": ["frozen"],
    }


def test_names_and_meta_of_shards() -> None:
    state = sharded(1).state_dict(7)
    assert state["replicated"] == {}
    assert names(state)["local"]["bias"] == ["adam_m_00001", "adam_t_00001", "adam_v_00001"]
    moments = {f"adam_{slot}_0000{index}" for slot in "mtv" for index in (0, 1)}
    assert {"h_i", "owned_h", *moments} < set(names(state)["local"]["matrix"])
    assert state["meta"] == {
        "version": 1,
        "layout": "fsdp",
        "compressor": "lowrank",
        "feedback": "ef21",
        "target": "update",
        "world_size": 2,
        "step": 7,
    }


def bits(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, torch.Tensor) else state


def load(states: ParameterStates | ShardedStates, state: Any) -> int:
    return states.load_state_dict(state, 2) if isinstance(states, ParameterStates) else states.load_state_dict(state)


def saved(states: ParameterStates | ShardedStates) -> Any:
    return states.state_dict(7, 2) if isinstance(states, ParameterStates) else states.state_dict(7)


@pytest.mark.parametrize("make", [whole, sharded], ids=["whole", "shards"])
def test_what_is_saved_loads(make: Any) -> None:
    state, other = saved(make(1)), make(2)
    assert load(other, state) == 7
    assert bits(saved(other)) == bits(state)
    loaded = saved(other)["local"]["matrix"]["h_i"]
    assert loaded.data_ptr() != state["local"]["matrix"]["h_i"].data_ptr(), "copied"


@pytest.mark.parametrize("make", [whole, sharded], ids=["whole", "shards"])
def test_what_does_not_fit_is_named_and_changes_nothing(make: Any) -> None:
    state, other = saved(make(1)), make(2)
    before = bits(saved(other))

    def refused(**changed: Any) -> str:
        wrong = copy.deepcopy(state)
        for key, value in changed.items():
            if value is None:
                del wrong["local"]["matrix"][key]
            else:
                wrong["local"]["matrix"][key] = value
        with pytest.raises(CommStateMismatch) as caught:
            load(other, wrong)
        assert bits(saved(other)) == before
        return str(caught.value)

    owned = next(slot for slot in state["local"]["matrix"] if slot.startswith("owned_"))
    assert "has ['adam_" in refused(h_i=None)
    assert "'stranger'" in refused(stranger=torch.zeros(1))
    assert "'h_i' of 'matrix' is (5, 6) torch.float32, expected (6, 5) torch.float32" in refused(h_i=torch.zeros(5, 6))
    assert "torch.float64" in refused(h_i=torch.zeros(6, 5, dtype=torch.float64))
    assert "expected (3, 5)" in refused(**{owned: torch.zeros(2, 5)})
    wrong = {**state, "local": {**state["local"], "other": {"h_i": torch.zeros(1)}}}
    with pytest.raises(CommStateMismatch, match="local error-feedback state of 'other': no such compressed parameter"):
        load(other, wrong)
    wrong = {**state, "meta": {**state["meta"], "world_size": 3}}
    with pytest.raises(CommStateMismatch, match="saved with world_size = 3, this run has 2") as caught:
        load(other, wrong)
    assert ("reducer.load_resharded(read, ranks)" in caught.value.fix) == isinstance(other, ParameterStates)
    wrong["meta"]["transport"] = "all-gather"  # what "auto" is for two ranks, and not for three
    with pytest.raises(CommStateMismatch, match="saved with world_size = 3, this run has 2"):
        load(other, wrong)


def test_owned_slots_may_be_missing_before_the_first_relay() -> None:
    state = saved(whole(1))
    state["local"]["matrix"] = {k: v for k, v in state["local"]["matrix"].items() if not k.startswith(OWNED)}
    other = whole(2)
    load(other, state)
    assert other.params["matrix"].owned is None
    for slot in [k for k in saved(sharded(1))["local"]["matrix"] if k.startswith(OWNED)]:
        partial = saved(sharded(1))
        del partial["local"]["matrix"][slot]
        with pytest.raises(CommStateMismatch, match="expected"):
            load(sharded(2), partial)


def test_split_reverses_prefixed() -> None:
    one, two, three = ({"s": torch.zeros(1)}, {"s": torch.ones(1)}, {"v_00003": torch.ones(2)})
    parts = split(one | prefixed(OWNED, two) | prefixed(MOMENT, three))
    assert (parts.own, parts.owned, parts.moments) == (one, two, three)
    assert prefixed(OWNED, None) == {}
