"""The simulation against steps written out by hand, and its corners."""

from __future__ import annotations

import pytest
import torch

from outlast.comm.analysis.simulate import Simulation, Transport
from outlast.comm.compressors import TopK
from outlast.comm.feedback import EF14, EF21, EF21SGDM, EControl, Feedback
from outlast.errors import CommError, NonFiniteGradient, OutOfRange
from tests.comm.analysis.batched import rows

METHODS = [EF14, EF21, EF21SGDM, EControl]


def test_ef21_by_hand() -> None:
    """Two ranks, Top-1 of two entries."""
    simulation = Simulation(EF21(TopK(k=1)), 2, (2,), torch.float64)
    first = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])]
    second = [torch.tensor([4.0, 1.0]), torch.tensor([3.5, 2.0])]
    gs = [[g.double() for g in gs] for gs in (first, second)]
    assert simulation.step(gs[0]).tolist() == [2.0, 0.0]
    assert simulation.step(gs[1]).tolist() == [3.5, 2.0]
    assert [local["h_i"].tolist() for local in simulation.local] == [[4.0, 2.0], [3.0, 2.0]]


def test_ef14_in_two_phases_by_hand() -> None:
    """Two ranks, slices of two entries of a vector of four, Top-1 of each."""
    simulation = Simulation(EF14(TopK(k=1)), 2, (4,), torch.float64, transport="two-phase")
    gs = [torch.tensor([1.0, 2.0, 0.0, 5.0]).double(), torch.tensor([4.0, 1.0, 3.0, 2.0]).double()]
    # Sent: (0, 2 | 0, 5) and (4, 0 | 3, 0); their mean (2, 1 | 1.5, 2.5); of that, (2, 0 | 0, 2.5).
    assert simulation.step(gs).tolist() == [2.0, 0.0, 0.0, 2.5]
    assert [local["e"].tolist() for local in simulation.local] == [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 2.0]]
    assert [owned["s"].tolist() for owned in simulation.owned] == [[0.0, 1.0], [1.5, 0.0]]
    zeros = [torch.zeros(4, dtype=torch.float64)] * 2
    # Sent: (1, 0 | 0, 0) and (0, 1 | 0, 2); owners have (0.5, 1.5 | 1.5, 1).
    assert simulation.step(zeros).tolist() == [0.0, 1.5, 1.5, 0.0]


@pytest.mark.parametrize("make", METHODS)
def test_rows_are_ranks(make: type[Feedback]) -> None:
    """What other tests do with many ranks in one tensor is what ranks do."""
    generator = torch.Generator().manual_seed(0)
    apart = Simulation(make(TopK(k=3)), 5, (20,), torch.float64)
    stacked = Simulation(make(rows(3, 20)), 1, (5, 20), torch.float64)
    for _ in range(20):
        gs = torch.randn(5, 20, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(stacked.step([gs]).mean(0), apart.step(list(gs)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transport", ["all-gather", "two-phase"])
@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("shape", [(2, 3), (5,), (), (3, 2, 2)])
def test_odd_shapes(make: type[Feedback], transport: Transport, shape: tuple[int, ...]) -> None:
    """Fewer rows than ranks, vectors, scalars: some slices are empty."""
    simulation = Simulation(make(TopK(k=1)), 4, shape, transport=transport)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        estimate = simulation.step([torch.randn(shape, generator=generator) for _ in range(4)], whole=step == 2)
        assert tuple(estimate.shape) == shape


@pytest.mark.parametrize("transport", ["all-gather", "two-phase"])
@pytest.mark.parametrize("make", METHODS)
def test_two_runs_give_the_same_bits_and_leave_gradients_alone(make: type[Feedback], transport: Transport) -> None:
    runs = [Simulation(make(TopK(0.2)), 3, (6, 5), transport=transport) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        gs = [torch.randn(6, 5, generator=generator) for _ in range(3)]
        copies = [g.clone() for g in gs]
        found = [run.step(gs, whole=step == 2) for run in runs]
        assert torch.equal(found[0], found[1])
        assert all(torch.equal(g, copy) for g, copy in zip(gs, copies, strict=True))


def test_a_start_from_zero() -> None:
    simulation = Simulation(EF21(TopK(k=1)), 1, (2,), dense_start=False)
    assert simulation.step([torch.tensor([1.0, 2.0])]).tolist() == [0.0, 2.0]


def test_what_is_refused() -> None:
    with pytest.raises(OutOfRange, match="n = 0"):
        Simulation(EF21(TopK(k=1)), 0, (2,))
    with pytest.raises(OutOfRange, match="transport = 'ring'"):
        Simulation(EF21(TopK(k=1)), 1, (2,), transport="ring")  # type: ignore[arg-type]
    simulation = Simulation(EF21(TopK(k=1)), 2, (2,))
    with pytest.raises(CommError, match="1 gradients for 2 ranks"):
        simulation.step([torch.ones(2)])
    with pytest.raises(CommError, match="ef21 needs every rank"):
        simulation.step([torch.ones(2)] * 2, participate=[True, False])
    with pytest.raises(NonFiniteGradient):
        simulation.step([torch.ones(2), torch.full((2,), torch.inf)])
