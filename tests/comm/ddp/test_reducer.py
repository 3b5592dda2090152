"""The reducer under DDP, in real processes: same bits on every rank, for every bucket layout, and as in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from outlast.comm import CommConfig, GradientReducer, attach
from outlast.errors import CommError, CommStateMismatch, NonFiniteGradient
from tests.comm.ranks import Ranks
from tests.comm.toy import (
    CONFIG,
    FEEDBACKS,
    SHAPES,
    Toy,
    backward,
    estimates,
    frozen,
    gradients,
    simulate,
    wrap,
)

ENTRIES = sum(torch.Size(shape).numel() for shape in SHAPES.values())


def run_steps(rank: int, settings: dict[str, Any], cap_mb: float, view: bool, steps: int) -> Any:
    ddp, reducer = wrap(settings, cap_mb=cap_mb, view=view)
    seen = []
    for step in range(1, steps + 1):
        reducer.begin_step(step)
        backward(ddp, gradients(step, rank))
        stats = reducer.end_step()
        assert stats.exposed_s >= 0
        assert stats.codec_s > 0
        seen.append(estimates(ddp.module))
    state = reducer.state_dict()
    reducer.close()
    return seen, frozen(state["replicated"]), stats.collectives


@pytest.mark.parametrize(
    "settings",
    [
        *({"feedback": name} for name in FEEDBACKS),
        {"feedback": "ef21-sgdm", "warmup_steps": 2},
        {"compressor": "dense"},
    ],
    ids=lambda s: "-".join(str(value) for value in s.values()),
)
def test_every_layout_gives_the_bits_of_the_simulation(three_ranks: Ranks, settings: dict[str, Any]) -> None:
    steps = 4
    expected = simulate(settings, [[gradients(step, rank) for rank in range(3)] for step in range(1, steps + 1)])
    replicated = []
    collectives = []
    for cap_mb, view in [(25.0, False), (0.001, True), (0.01, False)]:
        for seen, state, count in three_ranks.run(run_steps, settings, cap_mb, view, steps):
            assert seen == expected
            replicated.append(state)
            collectives.append(count)
    assert all(state == replicated[0] for state in replicated)
    assert max(collectives) > min(collectives), "the layouts must differ for this test to say anything"


def run_resumed(rank: int, settings: dict[str, Any], until: int, steps: int, explicit: bool) -> Any:
    ddp, reducer = wrap(settings, cap_mb=0.01)
    for step in range(1, until + 1):
        backward(ddp, gradients(step, rank))
    saved = reducer.state_dict()
    copy = {
        part: {name: {slot: tensor.clone() for slot, tensor in slots.items()} for name, slots in saved[part].items()}
        for part in ("local", "replicated")
    }
    reducer.close()
    ddp, reducer = wrap(settings, cap_mb=25, view=True)
    reducer.load_state_dict({**copy, "meta": saved["meta"]})
    for step in range(until + 1, steps + 1):
        if explicit:
            reducer.begin_step(step)
        backward(ddp, gradients(step, rank))
    result = estimates(ddp.module), frozen(reducer.state_dict())
    reducer.close()
    return result


@pytest.mark.parametrize("settings", [{"feedback": name, "warmup_steps": 1} for name in FEEDBACKS], ids=FEEDBACKS)
def test_a_resumed_reducer_goes_on_bit_for_bit(three_ranks: Ranks, settings: dict[str, Any]) -> None:
    straight = three_ranks.run(run_resumed, settings, 0, 5, False)
    assert three_ranks.run(run_resumed, settings, 3, 5, True) == straight
    assert three_ranks.run(run_resumed, settings, 3, 5, False) == straight


def run_accumulation(rank: int, view: bool) -> Any:
    ddp, reducer = wrap({}, cap_mb=0.01, view=view)
    seen = []
    for step in (1, 2, 3):
        reducer.begin_step(step)
        ddp.zero_grad()
        with ddp.no_sync():
            ddp(gradients(step, rank, 0)).backward()
        ddp(gradients(step, rank, 1)).backward()
        seen.append(estimates(ddp.module))
    with pytest.raises(CommError, match="averaged twice in step 3") as caught:
        ddp(gradients(4, rank)).backward()
    assert "no_sync" in caught.value.fix
    reducer.close()
    return seen


@pytest.mark.parametrize("view", [False, True])
def test_accumulated_gradients_are_one_message(three_ranks: Ranks, view: bool) -> None:
    per_step = []
    for step in (1, 2, 3):
        halves = [(gradients(step, rank, 0), gradients(step, rank, 1)) for rank in range(3)]
        per_step.append([{name: a[name] + b[name] for name in a} for a, b in halves])
    for seen in three_ranks.run(run_accumulation, view):
        assert seen == simulate({}, per_step)


def run_bare(rank: int) -> Any:
    model = Toy()
    reducer = GradientReducer(model.named_parameters(), CommConfig(**CONFIG))
    seen = []
    for step in (1, 2, 3):
        model.zero_grad()
        model(gradients(step, rank)).backward()
        reducer.reduce()
        seen.append(estimates(model))
    model.zero_grad()
    reducer.reduce()  # no gradient counts as zero
    assert all(p.grad is not None for p in model.parameters())
    reducer.close()
    with pytest.raises(CommError, match="closed"):
        reducer.reduce()
    return seen


def test_without_ddp(three_ranks: Ranks) -> None:
    expected = simulate({}, [[gradients(step, rank) for rank in range(3)] for step in (1, 2, 3)])
    assert three_ranks.run(run_bare) == [expected] * 3


def run_non_finite(rank: int, value: float, feedback: str, step_at: int) -> Any:
    ddp, reducer = wrap({"feedback": feedback}, cap_mb=0.01)
    for step in range(1, step_at):
        backward(ddp, gradients(step, rank))
    wanted = gradients(step_at, rank)
    if rank == 1:
        wanted["mid"][3, 4] = value
    with pytest.raises(NonFiniteGradient) as caught:
        backward(ddp, wanted)
    for call in (reducer.end_step, reducer.state_dict, reducer.reduce, lambda: reducer.begin_step(9)):
        with pytest.raises(NonFiniteGradient):
            call()
    reducer.close()
    reducer.close()
    return caught.value.what


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("feedback", ["ef14", "ef21-sgdm"])
def test_a_number_that_is_none_is_found_on_every_rank(three_ranks: Ranks, value: float, feedback: str) -> None:
    for what in three_ranks.run(run_non_finite, value, feedback, 3):
        assert "gradient of mid on rank 1" in what


def test_a_number_that_is_none_is_found_in_the_first_message(three_ranks: Ranks) -> None:
    for what in three_ranks.run(run_non_finite, float("nan"), "ef21", 1):
        assert "gradient of mid" in what


class Log:
    """An observer that keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def enter(self, op: str, nbytes: int, label: str) -> int:
        self.heard.append(("enter", op, nbytes, label))
        return len(self.heard)

    def complete(self, token: int) -> None:
        self.heard.append(("complete", token))


def run_observed(rank: int) -> Any:
    log = Log()
    ddp, reducer = wrap({}, cap_mb=0.01, observer=log)
    for step in (1, 2, 3):
        backward(ddp, gradients(step, rank))
    stats = reducer.end_step()
    reducer.close()
    return log.heard, stats.wire_bytes, stats.dense_bytes, stats.collectives


def test_observer_and_figures(three_ranks: Ranks) -> None:
    found = three_ranks.run(run_observed)
    assert all(one == found[0] for one in found)
    heard, wire_bytes, dense_bytes, collectives = found[0]
    enters = [entry for entry in heard if entry[0] == "enter"]
    assert {entry[1] for entry in enters} == {"all_gather", "all_to_all"}
    assert heard[0::2] == enters, "one at a time"
    assert heard[1::2] == [("complete", token) for token in range(1, len(heard), 2)], "each one entered completed"
    last_step = enters[-collectives:]
    assert wire_bytes == 2 * sum(entry[2] for entry in last_step)
    assert dense_bytes == 2 * 2 * 4 * ENTRIES // 3
    assert wire_bytes < dense_bytes / 4


def run_part_of_the_ranks(rank: int) -> Any:
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    group = groups[rank // 2]
    for _ in range(2):  # a second reducer on the same ranks, after the first was closed
        model = Toy()
        ddp = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
        reducer = attach(ddp, **CONFIG)
        assert reducer.world_size == len(dist.get_process_group_ranks(group))
        for step in (1, 2, 3):
            backward(ddp, gradients(step, rank))
        reducer.close()
    other = GradientReducer(Toy().named_parameters(), CommConfig(), group=None)
    with pytest.raises(CommError, match="averages over ranks"):
        other.attach(ddp)
    other.close()
    return estimates(model)


def test_part_of_the_ranks(three_ranks: Ranks) -> None:
    pair = simulate({}, [[gradients(step, rank) for rank in (0, 1)] for step in (1, 2, 3)])
    alone = simulate({}, [[gradients(step, 2)] for step in (1, 2, 3)])
    assert three_ranks.run(run_part_of_the_ranks) == [pair[-1], pair[-1], alone[-1]]


def run_dtype(rank: int, dtype: torch.dtype) -> Any:
    ddp, reducer = wrap({}, dtype=dtype, cap_mb=0.01)
    for step in (1, 2, 3):
        backward(ddp, gradients(step, rank, dtype=dtype))
    kept = {tensor.dtype for slots in reducer.state_dict()["local"].values() for tensor in slots.values()}
    reducer.close()
    assert kept == {torch.float64 if dtype == torch.float64 else torch.float32}
    return {name: p.grad.to(torch.float64).numpy().tobytes() for name, p in ddp.module.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_of_gradient(three_ranks: Ranks, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    steps = [[gradients(step, rank, dtype=dtype) for rank in range(3)] for step in (1, 2, 3)]
    widened = [[{name: g.to(wide) for name, g in rank.items()} for rank in ranks] for ranks in steps]
    expected = simulate({}, widened)[-1]
    for found in three_ranks.run(run_dtype, dtype):
        for name, data in found.items():
            values = torch.frombuffer(bytearray(expected[name]), dtype=torch.float64)
            assert data == values.to(wide).to(dtype).to(torch.float64).numpy().tobytes()


def run_mismatches(rank: int) -> Any:
    ddp, reducer = wrap({"feedback": "ef21"})
    backward(ddp, gradients(1, rank))
    good = reducer.state_dict()
    local, meta = good["local"], good["meta"]
    bad = {
        "feedback = 'ef14'": {**good, "meta": {**meta, "feedback": "ef14"}},
        "world_size = 7": {**good, "meta": {**meta, "world_size": 7}},
        "version = 99": {**good, "meta": {**meta, "version": 99}},
        "'other'": {**good, "local": {**local, "other": local["mid"]}},
        "'mid' is missing": {**good, "local": {name: slots for name, slots in local.items() if name != "mid"}},
        "has ['x'], expected ['h_i']": {**good, "local": {**local, "mid": {"x": local["mid"]["h_i"]}}},
        "(40, 50) torch.float32": {**good, "local": {**local, "mid": {"h_i": local["mid"]["h_i"].T}}},
        "torch.float64": {**good, "local": {**local, "mid": {"h_i": local["mid"]["h_i"].double()}}},
    }
    before = frozen(good)
    for expected, state in bad.items():
        with pytest.raises(CommStateMismatch) as caught:
            reducer.load_state_dict(state)
        assert expected in caught.value.what
    assert frozen(reducer.state_dict()) == before, "a state that is refused changes nothing"
    reducer.close()
    with pytest.raises(CommError, match="is given twice"):
        GradientReducer([("a", torch.zeros(2)), ("a", torch.zeros(2))], CommConfig())
    with pytest.raises(CommError, match="belongs to none"):
        reducer._states.of(torch.zeros(3))
    return True


def test_state_that_does_not_fit_is_named(three_ranks: Ranks) -> None:
    assert all(three_ranks.run(run_mismatches))


def test_no_process_group_is_said() -> None:
    with pytest.raises(CommError, match="no process group") as caught:
        GradientReducer(Toy().named_parameters(), CommConfig())
    assert "init_process_group" in caught.value.fix
