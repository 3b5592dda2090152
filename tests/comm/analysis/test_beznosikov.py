"""Three quadratics on which plain Top-1 diverges and every error feedback converges (arXiv 2002.12410, example 1).

f_i(x) = <a_i, x>^2 + ||x||^2 / 4, from x = (1, 1, 1). By symmetry plain Top-1 multiplies x by exactly 1 + 11 gamma / 6.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from outlast.comm.analysis.simulate import Simulation, Transport
from outlast.comm.compressors import TopK
from outlast.comm.feedback import EF14, EF21, EF21BC, EF21PP, EF21SGDM, EF21W, EControl, Feedback, NoFeedback

A = torch.tensor([[-3, 2, 2], [2, -3, 2], [2, 2, -3]], dtype=torch.float64)
GAMMA = 0.05
START = torch.ones(3, dtype=torch.float64)


def gradients(x: Tensor) -> list[Tensor]:
    return [2 * (a @ x) * a + x / 2 for a in A]


def norms(
    feedback: Feedback,
    steps: int,
    *,
    dense_start: bool = True,
    transport: Transport = "all-gather",
    tolerance: float = 1e-12,
) -> list[float]:
    """||x|| after each step, until it is below ``tolerance``."""
    simulation = Simulation(
        feedback, 3, (3,), torch.float64, transport=transport, dense_start=dense_start and feedback.dense_start
    )
    x = START.clone()
    found: list[float] = []
    while len(found) < steps and (not found or found[-1] >= tolerance):
        x = x - GAMMA * simulation.step(gradients(x))
        found.append(float(x.norm()))
    return found


def test_plain_top_1_diverges_at_the_known_rate() -> None:
    found = [float(START.norm()), *norms(NoFeedback(TopK(k=1)), 200)]
    for before, after in itertools.pairwise(found):
        assert after / before == pytest.approx(1 + 11 * GAMMA / 6, rel=1e-12)
    assert found[-1] > 1e7


@pytest.mark.parametrize(
    ("feedback", "dense_start", "steps"),
    [
        (EF14(TopK(k=1)), False, 388),
        (EF21(TopK(k=1)), False, 413),  # from h_i = 0: the first message is C(g)
        (EF21(TopK(k=1)), True, 385),
        (EControl(TopK(k=1), eta=0.1), True, 532),
    ],
    ids=["ef14", "ef21", "ef21-dense-start", "econtrol"],
)
def test_steps_to_converge(feedback: Feedback, dense_start: bool, steps: int) -> None:
    found = norms(feedback, 1000, dense_start=dense_start)
    assert found[-1] < 1e-12
    assert len(found) == steps


@pytest.mark.parametrize("eta", [0.1, 1.0])
def test_momentum_converges(eta: float) -> None:
    found = norms(EF21SGDM(TopK(k=1), eta=eta), 3000, tolerance=1e-12 if eta == 1 else 1e-4)
    assert found[-1] < 1e-4
    if eta == 1.0:
        assert len(found) == 385, "with eta = 1 it is EF21"


def test_variants_that_are_ef21_here() -> None:
    """Nobody is absent; Top-1 is positively homogeneous."""
    expected = norms(EF21(TopK(k=1)), 60)
    assert norms(EF21PP(TopK(k=1)), 60) == expected
    assert norms(EF21W(TopK(k=1), [0.5, 0.25, 0.25]), 60) == pytest.approx(expected, rel=1e-12)


def test_residuals_in_8_bits_converge() -> None:
    """The ranks' optima are the same, so residuals vanish, and with them what rounding adds."""
    assert norms(EF14(TopK(k=1), residual="int8"), 1000, tolerance=1e-9)[-1] < 1e-9


@pytest.mark.parametrize("make", [EF14, EF21, EF21BC, EF21SGDM, EF21PP, EControl])
def test_two_phase_converges(make: type[Feedback]) -> None:
    """Slices of one entry: Top-1 of them sends all, so these are the exact gradients in each method's own terms."""
    assert norms(make(TopK(k=1)), 3000, transport="two-phase", tolerance=1e-4)[-1] < 1e-4
