"""Random faults against the control plane, in a simulation in which nothing is left to chance but the seed."""

from __future__ import annotations

import os

import pytest

from outlast.launch.control.leader import Leader

from .simulated_faults import faults, settle
from .simulated_node import cluster
from .simulated_world import Violation, World

SCHEDULES = int(os.environ.get("OUTLAST_TEST_SCHEDULES", "40"))


@pytest.fixture(autouse=True)
def the_dead_are_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated machine's processes all die with it."""
    monkeypatch.setattr("outlast.launch.control.node.is_dead", lambda pid, started: True)


def play(seed: int) -> World:
    """One schedule of faults."""
    sizes = [(2, 2, 3), (2, 2, 5), (1, 2, 3), (2, 4, 5), (3, 3, 4), (4, 4, 5), (1, 1, 3), (2, 3, 7)]
    least, most, nodes = sizes[seed % len(sizes)]
    world = cluster(seed, nodes=nodes, least=least, most=most)
    for node in world.nodes:
        world.at(world.rng.uniform(0.0, 2.0), node.boot)
    try:
        faults(world, 60.0)
        settle(world, 80.0)
    except Violation as error:
        raise Violation(f"seed {seed}: {error}\n" + "\n".join(world.history[-80:])) from error
    finally:
        world.close()
    return world


@pytest.mark.parametrize("part", range(4))
def test_whatever_goes_wrong(part: int) -> None:
    generations = 0
    for seed in range(part, SCHEDULES, 4):
        generations += play(seed).log().next_generation
    assert generations > 2 * SCHEDULES / 4, "faults must have ended generations"


def test_the_check_bites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the fence two generations run at once."""
    monkeypatch.setattr(Leader, "_has_stopped", lambda self, member: True)
    found = 0
    for seed in range(400):
        try:
            play(seed)
        except Violation as error:
            found += "run at once" in str(error)
        if found:
            break
    assert found
