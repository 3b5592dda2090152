"""Step rules and guarantees: identities, limits, and what they say of real runs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.comm.analysis.simulate import Simulation
from outlast.comm.analysis.theory import (
    SmoothnessEstimate,
    econtrol_eta,
    ef14_bound,
    ef14_step,
    ef21_bound,
    ef21_step,
    ef21_w_step,
    estimate_smoothness,
    theta_beta,
    weights,
)
from outlast.comm.feedback import EF21
from outlast.errors import OutOfRange
from tests.comm.analysis.batched import rows

ALPHAS = st.floats(1e-4, 1.0)


@given(alpha=ALPHAS)
def test_constants(alpha: float) -> None:
    theta, beta = theta_beta(alpha)
    root = math.sqrt(1 - alpha)
    assert math.sqrt(beta / theta) == pytest.approx(root / (1 - root), abs=1e-9)
    assert math.sqrt(beta / theta) <= 2 / alpha
    # They are (1 - alpha)(1 + s) = 1 - theta and (1 - alpha)(1 + 1 / s) = beta of Young's inequality, for one s.
    if 1e-3 < alpha < 1:
        s = (1 - theta) / (1 - alpha) - 1
        assert (1 - alpha) * (1 + 1 / s) == pytest.approx(beta, rel=1e-6)


@given(alpha=ALPHAS, each=st.lists(st.floats(0.1, 100), min_size=1, max_size=8))
def test_weights_never_shorten_the_step(alpha: float, each: list[float]) -> None:
    mean = sum(each) / len(each)
    assert ef21_w_step(mean, each, alpha) >= ef21_step(mean, each, alpha) * (1 - 1e-12)
    assert ef21_step(mean, each, 1.0) == pytest.approx(1 / mean)


def test_other_rules() -> None:
    assert ef14_step(2.0, 1.0) == 0.125
    assert ef14_step(1.0, 0.01) == pytest.approx(0.01 / math.sqrt(0.99) / 4)
    assert econtrol_eta(0.4) == 0.001
    assert ef21_bound(1.0, 0.5, 8, 0.5) == 0.5
    assert ef21_bound(1.0, 0.5, 8, 0.75, 1.0) == 0.5 + 1 / (0.5 * 8)
    assert ef14_bound(1.0, 0.5, 8, 1.0, 1.0, 5.0) == 1.0
    for wrong in (0.0, -1.0, 1.1):
        with pytest.raises(OutOfRange, match="alpha"):
            theta_beta(wrong)
    with pytest.raises(OutOfRange, match="each"):
        ef21_step(1.0, [1.0, 0.0], 0.5)
    with pytest.raises(OutOfRange, match="smoothness"):
        ef14_step(0.0, 0.5)


@settings(max_examples=60)
@given(each=st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=12))
def test_weights(each: list[float]) -> None:
    found, n = weights(each), len(each)
    assert sum(found) == pytest.approx(1, abs=1e-9)
    assert all(0.25 * 0.999999 <= n * w <= 4 * 1.000001 for w in found)
    order = sorted(range(n), key=lambda i: each[i])
    assert all(found[a] <= found[b] * (1 + 1e-9) for a, b in itertools.pairwise(order))


def test_weights_within_limits_are_shares() -> None:
    assert weights([1.0, 2.0, 3.0]) == pytest.approx((1 / 6, 2 / 6, 3 / 6))
    assert weights([0.0, 0.0]) == (0.5, 0.5)
    assert weights([1.0] * 19 + [1000.0])[-1] == pytest.approx(4 / 20)
    for wrong in ([], [-1.0], [math.inf]):
        with pytest.raises(OutOfRange, match="each"):
            weights(wrong)


def test_smoothness_is_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    curvature = torch.tensor([1.0, 2.0, 7.0])
    points = [torch.randn(3, generator=generator) for _ in range(200)]
    found = estimate_smoothness([curvature * x for x in points], points)
    assert 6.5 < found <= 7.0001
    fading = SmoothnessEstimate(memory=0.5)
    zero, one = torch.zeros(1), torch.ones(1)
    assert fading.update(8 * one, zero, one, zero) == 8
    assert fading.update(one, zero, one, zero) == 4
    assert fading.update(one, zero, one, one) == 4, "nothing is learnt where nothing moved"
    with pytest.raises(OutOfRange, match="points"):
        estimate_smoothness([one], [one])
    with pytest.raises(OutOfRange, match="memory"):
        SmoothnessEstimate(memory=0.0)


@pytest.mark.parametrize("dense_start", [True, False])
def test_ef21_keeps_its_guarantee(dense_start: bool) -> None:
    """Also from h_i = 0, where the start error counts."""
    each = torch.tensor([1.0, 3.0, 5.0, 11.0], dtype=torch.float64).view(-1, 1)
    centres = torch.randn(4, 25, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = (each * centres).sum(0) / each.sum()
    smoothness, alpha = float(each.mean()), 1 / 25
    gamma = ef21_step(smoothness, each.view(-1).tolist(), alpha)
    simulation = Simulation(EF21(rows(1, 25)), 1, (4, 25), torch.float64, dense_start=dense_start)
    x = torch.ones(25, dtype=torch.float64)
    gap = smoothness / 2 * float((x - solution).square().sum())
    start = 0.0 if dense_start else float((each * (x - centres)).square().sum(1).mean())
    squares = 0.0
    for steps in range(1, 301):
        gs = each * (x - centres)
        squares += float(gs.mean(0).square().sum())
        assert squares / steps <= ef21_bound(gap, gamma, steps, alpha, start)
        x = x - gamma * simulation.step([gs]).mean(0)
