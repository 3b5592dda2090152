"""State of n ranks on m: means stay, training goes on, and nothing changes where nothing changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from outlast.comm.analysis.simulate import Simulation, Transport, rank_order_mean
from outlast.comm.compressors import LowRank, RandK, Slots, TopK
from outlast.comm.config import CommConfig
from outlast.comm.feedback import EF14, EF21, EF21BC, EF21SGDM, EF21W, EControl, Feedback
from outlast.comm.feedback.layout import unit
from outlast.comm.slices import Cut
from outlast.comm.state.parameters import ParameterStates, ParamState
from outlast.comm.state.reshard import (
    Layout,
    drift,
    in_one,
    in_rows,
    reshard,
    reshard_all,
    resync,
    tracked,
)
from outlast.comm.state.slots import OWNED
from outlast.errors import CommStateMismatch

SHAPE = (7, 6)
METHODS: dict[str, Callable[[int], Feedback]] = {
    "ef14": lambda n: EF14(TopK(0.1)),
    "ef14-int8": lambda n: EF14(TopK(0.1), residual="int8"),
    "ef14-randk": lambda n: EF14(RandK(0.1)),
    "ef21": lambda n: EF21(TopK(0.1)),
    "ef21-lowrank": lambda n: EF21(LowRank(1)),
    "ef21-sgdm": lambda n: EF21SGDM(TopK(0.1), 0.3),
    "ef21-w": lambda n: EF21W(TopK(0.1), [2 * (i + 1) / (n * (n + 1)) for i in range(n)]),
    "econtrol": lambda n: EControl(TopK(0.1)),
}


def layout(n: int, transport: str, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Layout:
    return in_one(shape, dtype) if transport == "all-gather" else in_rows(shape, n, dtype)


def tree(simulation: Simulation) -> list[dict[str, Slots]]:
    """As checkpoints hold it: of each rank, by the parameter's name."""
    owned: list[Slots] = simulation.owned or [{} for _ in range(simulation.n)]
    return [
        {"p": {**local, **{OWNED + slot: tensor for slot, tensor in mine.items()}}}
        for local, mine in zip(simulation.local, owned, strict=True)
    ]


def on(simulation: Simulation, m: int, feedback: Feedback, transport: Transport) -> Simulation:
    """The simulation, to be continued on ``m`` ranks."""
    dtype = simulation.dtype
    result = Simulation(feedback, m, simulation.shape, dtype, transport=transport)
    before = "two-phase" if simulation.owned else "all-gather"
    layouts = {"p": tuple(layout(k, t, simulation.shape, dtype) for k, t in ((simulation.n, before), (m, transport)))}
    replicated = {"p": simulation.replicated}
    moved = reshard_all(layouts, tree(simulation), m, simulation.feedback, feedback, replicated)  # type: ignore[arg-type]
    result.replicated = simulation.replicated
    for rank, slots in enumerate(moved):
        result.local[rank] = {slot: t for slot, t in slots["p"].items() if not slot.startswith(OWNED)}
        owned = {slot.removeprefix(OWNED): t for slot, t in slots["p"].items() if slot.startswith(OWNED)}
        if owned:
            result.owned[rank] = owned
    result.started = True
    return result


def means(simulation: Simulation) -> Slots:
    """Of each of the method's slots, the mean over ranks (weighted as it counts); and the owners' slots, whole."""
    found: Slots = {}
    for rank, (method, local) in enumerate(zip(simulation.ranks, simulation.local, strict=True)):
        pieces = layout(simulation.n, "two-phase" if simulation.units > 1 else "all-gather", simulation.shape).pieces
        parts = [
            method.unpack(unit(method, local, index, simulation.units), piece.shape, torch.float32)
            for index, piece in enumerate(pieces)
        ]
        for slot in parts[0]:
            whole = torch.cat([part[slot].reshape(-1) for part in parts]).double().view(simulation.shape)
            share = 1.0 if slot in method.residual_slots else method.share
            found[slot] = found.get(slot, 0) + whole * share / simulation.n
        assert rank < simulation.n
    for slot in simulation.feedback.relay_slots if simulation.owned else ():
        found[slot] = torch.cat([owned[slot] for owned in simulation.owned])
    return found


def stepped(feedback: Feedback, n: int, transport: Transport, seed: int = 0, steps: int = 3) -> Simulation:
    generator = torch.Generator().manual_seed(seed)
    simulation = Simulation(feedback, n, SHAPE, transport=transport)
    for _ in range(steps):
        simulation.step([torch.randn(SHAPE, generator=generator) for _ in range(n)])
    return simulation


@pytest.mark.parametrize("transport", ["all-gather", "two-phase"])
@pytest.mark.parametrize("name", list(METHODS))
@settings(max_examples=8)
@example(counts=[4, 3, 5], seed=0)
@given(counts=st.lists(st.integers(2, 6), min_size=2, max_size=3), seed=st.integers(0, 99))
def test_means_stay(name: str, transport: Transport, counts: list[int], seed: int) -> None:
    simulation = stepped(METHODS[name](counts[0]), counts[0], transport, seed)
    for m in counts[1:]:
        before = means(simulation)
        simulation = on(simulation, m, METHODS[name](m), transport)
        for slot, mean in means(simulation).items():
            # What is packed in 8 bits is rounded once more.
            tolerance = 2e-2 if name.endswith("int8") and slot == "e" else 1e-6
            assert drift(mean, before[slot]) <= tolerance
        simulation.step([torch.ones(SHAPE)] * m)  # every slot is as the next step needs it


@pytest.mark.parametrize("name", list(METHODS))
def test_a_transport_with_slices_may_begin_and_end_at_one_rank(name: str) -> None:
    alone = stepped(METHODS[name](1), 1, "all-gather")
    before = means(alone)
    spread = on(alone, 4, METHODS[name](4), "two-phase")
    tolerance = 2e-2 if name.endswith("int8") else 1e-6
    for slot in before:
        assert drift(means(spread)[slot], before[slot]) <= tolerance
    if "h" in spread.replicated:
        assert drift(torch.cat([owned["w"] for owned in spread.owned]), before["h_i"]) <= 1e-6
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        spread.step([torch.randn(SHAPE, generator=generator) for _ in range(4)])
    before = means(spread)
    alone = on(spread, 1, METHODS[name](1), "all-gather")
    after = means(alone)
    if "e" in after and "s" in before:
        assert drift(after["e"], before["e"] + before["s"]) <= tolerance
    if "h_i" in after:
        assert drift(after["h_i"], spread.replicated["h"]) <= 1e-6


@pytest.mark.parametrize("transport", ["all-gather", "two-phase"])
@pytest.mark.parametrize("name", list(METHODS))
def test_the_same_ranks_keep_every_bit(name: str, transport: Transport) -> None:
    feedback = METHODS[name](4)
    simulation = stepped(feedback, 4, transport)
    both = layout(4, transport)
    old = tree(simulation)
    for rank, moved in enumerate(reshard_all({"p": (both, both)}, old, 4, feedback)):
        assert moved["p"].keys() == old[rank]["p"].keys()
        for slot, tensor in moved["p"].items():
            assert torch.equal(tensor, old[rank]["p"][slot])
            assert tensor.data_ptr() != old[rank]["p"][slot].data_ptr()


def test_only_the_ranks_that_matter_are_read() -> None:
    asked: list[int] = []
    old = tree(stepped(EF14(TopK(0.1)), 5, "all-gather"))

    def read(i: int) -> dict[str, Slots]:
        asked.append(i)
        return old[i]

    both = in_one(SHAPE)
    reshard({"p": (both, both)}, read, 5, 2, 1, EF14(TopK(0.1)))
    assert asked == [1, 3]


def test_moments_stay_with_their_rank() -> None:
    old = tree(stepped(EF14(TopK(0.1)), 2, "all-gather"))
    for rank, slots in enumerate(old):
        slots["p"] |= {"adam_m": torch.full(SHAPE, rank + 1.0), "adam_t": torch.tensor(7.0)}
    both = in_one(SHAPE)
    moved = reshard_all({"p": (both, both)}, old, 3, EF14(TopK(0.1)))
    assert [float(slots["p"]["adam_m"][0, 0]) for slots in moved] == [1, 2, 1.5]
    assert [float(slots["p"]["adam_t"]) for slots in moved] == [7, 7, 7]


def test_slices_of_any_entries() -> None:
    """As where each rank decodes its own shard alone: the replicated slots are then cut as well, anywhere."""

    def cut(*at: int) -> Layout:
        pieces = tuple(Cut(a, b, (b - a,)) for a, b in itertools.pairwise(at))
        return Layout(SHAPE, torch.float32, pieces)

    before, after = cut(0, 12, 42), cut(0, 30, 30, 42)
    h, hs = torch.randn(42), [torch.randn(SHAPE) for _ in range(2)]
    old: list[dict[str, Slots]] = [
        {"p": {"h_i": hs[rank], OWNED + "h": h[piece.start : piece.stop]}} for rank, piece in enumerate(before.pieces)
    ]
    found = reshard_all({"p": (before, after)}, old, 3, EF21(TopK(0.1)))
    assert torch.equal(torch.cat([slots["p"][OWNED + "h"] for slots in found]), h)
    torch.testing.assert_close(rank_order_mean([slots["p"]["h_i"] for slots in found]), rank_order_mean(hs))


def test_missing_state_is_named() -> None:
    old = tree(stepped(EF21(TopK(0.1)), 3, "all-gather"))
    both = in_one(SHAPE)
    with pytest.raises(CommStateMismatch, match="'p' is missing on rank 1 of 3"):
        reshard_all({"p": (both, both)}, [old[0], {}, old[2]], 2, EF21(TopK(0.1)))
    with pytest.raises(CommStateMismatch, match="'h_i' of 'p' has 42 entries, expected 48"):
        reshard_all({"p": (in_one((8, 6)), in_one((8, 6)))}, old, 2, EF21(TopK(0.1)))


class Shared:
    """60 heterogeneous quadratics dealt out over n ranks, so that their mean is the same for n = 3, 4, 5."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.centres = torch.randn(60, 10, 6, generator=generator, dtype=torch.float64)
        self.curvatures = 0.5 + torch.rand(60, 1, 1, generator=generator, dtype=torch.float64)
        self.solution = (self.curvatures * self.centres).mean(0) / self.curvatures.mean()

    def gradients(self, x: Tensor, n: int) -> list[Tensor]:
        each = self.curvatures * (x - self.centres)
        return [part.mean(0) for part in each.chunk(n)]

    def loss(self, x: Tensor) -> float:
        return float((x - self.solution).square().sum() / 2)


@pytest.mark.parametrize(
    ("make", "transport"),
    [
        (EF14, "all-gather"),
        (EF14, "two-phase"),
        (EF21, "all-gather"),
        (EF21BC, "two-phase"),
        (EF21SGDM, "all-gather"),
        (EF21SGDM, "two-phase"),
        (EControl, "all-gather"),
        (EControl, "two-phase"),
    ],
)
def test_training_goes_on(make: type[Feedback], transport: Transport) -> None:
    problem, feedback, gamma = Shared(), make(TopK(0.2)), 0.05
    x = torch.zeros(10, 6, dtype=torch.float64)
    simulation = Simulation(feedback, 4, (10, 6), torch.float64, transport=transport)
    losses: list[float] = []
    changes = []
    for m in (4, 3, 5):
        if m != simulation.n:
            simulation = on(simulation, m, feedback, transport)
            changes.append(len(losses))
        for _ in range(100):
            losses.append(problem.loss(x))
            x = x - gamma * simulation.step(problem.gradients(x, m))
    print(f"{feedback.name}: {[f'{losses[i]:.2e}' for i in (0, 99, 115, 199, 215, 299)]}")
    for at in changes:
        assert max(losses[at : at + 30]) < 0.02 * losses[0], "no jump"
    assert losses[-1] < (2e-2 if make is EF14 else 1e-5) * losses[0]


def test_without_the_rules_it_goes_elsewhere() -> None:
    """What the rules are for: the leaver's h_i is in h for good if it is only left out."""
    problem, feedback = Shared(), EF21(TopK(0.2))
    x = torch.zeros(10, 6, dtype=torch.float64)
    simulation = Simulation(feedback, 4, (10, 6), torch.float64)
    for _ in range(50):
        x = x - 0.05 * simulation.step(problem.gradients(x, 4))
    dropped = Simulation(feedback, 3, (10, 6), torch.float64)
    dropped.local, dropped.replicated, dropped.started = simulation.local[:3], simulation.replicated, True
    for _ in range(400):
        x = x - 0.05 * dropped.step(problem.gradients(x, 3))
    off = problem.loss(x)
    assert off > 1e-3
    # It is drift, and a dense mean cures it.
    exact = rank_order_mean([t for local in dropped.local if (t := tracked(feedback, local)) is not None])
    assert resync(dropped.replicated, exact) > 0.1
    for _ in range(400):
        x = x - 0.05 * dropped.step(problem.gradients(x, 3))
    assert problem.loss(x) < 1e-6 * off


def test_drift_is_rounding_and_is_measured() -> None:
    feedback = EF21(TopK(0.1))
    for transport in ("all-gather", "two-phase"):
        simulation = stepped(feedback, 4, transport, steps=100)  # type: ignore[arg-type]
        exact = rank_order_mean([local["h_i"] for local in simulation.local])
        if simulation.owned:
            parts = [exact[p.start // 6 : p.stop // 6] for p in in_rows(SHAPE, 4).pieces]
            found = max(resync(owned, part) for owned, part in zip(simulation.owned, parts, strict=True))
            assert torch.equal(torch.cat([owned["w"] for owned in simulation.owned]), exact)
        else:
            found = resync(simulation.replicated, exact)
            assert torch.equal(simulation.replicated["h"], exact)
        assert 0 < found < 1e-5
    assert resync({}, torch.ones(3)) == 0.0
    assert drift(torch.ones(2), torch.zeros(2)) == float("inf")


@pytest.mark.parametrize("name", [name for name in METHODS if not name.endswith("int8")])
@pytest.mark.parametrize("transport", ["all-gather", "two-phase"])
def test_it_is_what_a_reducer_loads(name: str, transport: str) -> None:
    """Names, shapes and types of all slots, from the reducer's own state of 4 ranks to that of 3."""
    config = CommConfig(dense_below=1)

    def state(method: Feedback, rank: int, n: int) -> ParamState:
        units = n if transport == "two-phase" else 1
        return ParameterStates([("p", torch.zeros(SHAPE))], config, method, units=units, rank=rank).params["p"]

    old: list[dict[str, Slots]] = []
    for rank in range(4):
        method = METHODS[name](4).of_rank(rank)
        mine = state(method, rank, 4)
        mine.start(method, torch.randn(SHAPE, generator=torch.Generator().manual_seed(rank)))
        assert mine.local is not None
        owned = mine.owner_slots(method) if transport == "two-phase" else {}
        old.append({"p": {**mine.local, **{OWNED + slot: tensor for slot, tensor in owned.items()}}})
    layouts = {"p": (layout(4, transport), layout(3, transport))}
    for rank, found in enumerate(reshard_all(layouts, old, 3, METHODS[name](4), METHODS[name](3))):
        method = METHODS[name](3).of_rank(rank)
        expected = state(method, rank, 3).schema(method, None).local
        assert {slot: (tuple(t.shape), t.dtype) for slot, t in found["p"].items()} == expected
