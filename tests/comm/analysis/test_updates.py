"""What error feedback makes of Adam's directions: why trackers are not for ``target = "update"``."""

from __future__ import annotations

import pytest
import torch

from outlast.comm.analysis.simulate import Simulation
from outlast.comm.compressors import TopK
from outlast.comm.direction import default_direction
from outlast.comm.feedback import EF14, EF21, EControl, Feedback

SHAPE = (50, 100)
STEPS = 400
TOP = TopK(0.03)


@pytest.mark.parametrize(
    ("method", "least", "most"),
    [(EF14(TOP), 0, 3), (EControl(TOP), 20, 60), (EControl(TOP, 0.06), 20, 60), (EF21(TOP), 150, 400)],
    ids=["ef14", "econtrol", "econtrol-strongest", "ef21"],
)
def test_directions_of_noise_are_paid_at_once_by_ef14_alone(method: Feedback, least: float, most: float) -> None:
    """By how many steps' worth an entry is off after some hundred steps whose gradients are noise.

    A tracker goes on with one sample of the noise until the entry is sent again, 33 steps later on average.
    """
    generator = torch.Generator().manual_seed(0)
    direction, simulation = default_direction(), Simulation(method, 1, SHAPE)
    moments, owed = direction.start(torch.zeros(SHAPE)), torch.zeros(SHAPE)
    for _ in range(STEPS):
        u = direction.move(moments, torch.randn(SHAPE, generator=generator), torch.empty(SHAPE))
        owed += u - simulation.step([u])
    assert least < float(owed.square().mean().sqrt()) < most
