"""Spikes are told once, and noise is not: series as runs have them."""

from __future__ import annotations

import math
import random

import pytest

from outlast.diagnostics.numerics import NumericsConfig
from outlast.diagnostics.numerics.spikes import Spike, Spikes, spike_event

CONFIG = NumericsConfig()


def of_loss() -> Spikes:
    return Spikes(CONFIG.spike_window, CONFIG.spike_sigmas, CONFIG.spike_loss_share)


def of_norm() -> Spikes:
    return Spikes(CONFIG.spike_window, CONFIG.spike_sigmas, CONFIG.spike_norm_factor - 1, in_logs=True)


def told(spikes: Spikes, values: list[float]) -> list[Spike]:
    return [found for step, value in enumerate(values, 1) if (found := spikes.look(step, value)) is not None]


def falling(steps: int, noise: float, seed: int = 0) -> list[float]:
    """A loss that falls as training's do, with the noise of small batches."""
    draw = random.Random(seed)
    return [2 + 8 / (1 + step / 50) + noise * draw.gauss(0, 1) for step in range(steps)]


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.3])
def test_a_clean_loss_says_nothing_in_10000_steps(noise: float) -> None:
    assert told(of_loss(), falling(10_000, noise)) == []


def test_norms_with_heavy_tails_say_nothing() -> None:
    draw = random.Random(0)
    assert told(of_norm(), [math.exp(draw.gauss(0, 0.3)) for _ in range(10_000)]) == []
    # Each hundredth batch is an odd one, with three times the norm: noise of such a run's.
    assert (
        told(of_norm(), [math.exp(draw.gauss(0, 0.3)) * (3 if draw.random() < 0.01 else 1) for _ in range(10_000)])
        == []
    )


def test_one_spike_is_told_when_it_begins_and_when_it_is_over() -> None:
    values = falling(1000, 0.02)
    values[700] += 3
    began, over = told(of_loss(), values)
    assert (began.first_step, began.is_over) == (701, False)
    assert began.value == values[700]
    assert began.baseline == pytest.approx(2.56, abs=0.05)
    assert began.sigmas > 50
    assert (over.first_step, over.last_step, over.is_over) == (701, 701, True)
    event = spike_event(701, "loss", began)
    assert event.told.startswith("the loss is 5.5")
    assert "the median of the steps before" in event.told
    assert spike_event(704, "loss", over).told.startswith("the loss is as before again, after 1 step of up to 5.5")


def test_a_ragged_spike_is_one() -> None:
    values = falling(600, 0.02)
    for step, more in ((400, 2.0), (402, 9.0), (405, 3.0)):
        values[step] += more
    _, over = told(of_loss(), values)
    assert (over.first_step, over.last_step) == (401, 406)
    assert over.value == values[402]


def test_a_loss_that_stays_is_the_level_and_is_told_twice_only() -> None:
    values = falling(400, 0.02) + [7 + random.Random(1).gauss(0, 0.02) for _ in range(600)]
    began, level = told(of_loss(), values)
    assert (began.first_step, level.is_level, level.is_over) == (401, True, False)
    assert level.last_step - level.first_step == 32
    assert "has stayed far above" in spike_event(433, "loss", level).told


def test_a_norm_that_explodes_is_told() -> None:
    draw = random.Random(0)
    values = [math.exp(draw.gauss(0, 0.2)) for _ in range(300)]
    values[200] *= 20
    began, over = told(of_norm(), values)
    assert began.first_step == 201
    assert over.is_over


def test_few_steps_constants_and_what_is_not_finite() -> None:
    assert told(of_loss(), [1.0] * 15 + [9.0] * 3) != []  # sixteen values are known, and all but one the same
    assert told(of_loss(), [1.0] * 10 + [9.0]) == []
    assert told(of_loss(), [1.0] * 200) == []
    assert told(of_loss(), [0.0] * 200) == []
    assert told(of_loss(), [1.0] * 100 + [1.1] * 100) == []  # not by a quarter
    assert told(of_norm(), [0.0] * 50 + [1e-8]) != []
    assert told(of_loss(), [1.0] * 100 + [math.nan, math.inf, 1.0]) == []
    (began, *_) = told(of_loss(), [1.0] * 100 + [2.0])
    assert spike_event(101, "loss", began).sigmas is None


def test_losses_below_zero() -> None:
    draw = random.Random(0)
    assert told(of_loss(), [-5 + draw.gauss(0, 0.1) for _ in range(2000)]) == []
    began, _ = told(of_loss(), [-5 + draw.gauss(0, 0.1) + (4 if step == 90 else 0) for step in range(200)])
    assert began.first_step == 91
