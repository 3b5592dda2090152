"""Every fault, many times, at places and times that differ: the right class and culprit, and nobody else."""

from __future__ import annotations

import pytest

from tests.diagnostics.syndromes.cases import CASES, confusion
from tests.diagnostics.syndromes.traces import Layout

SEEDS = range(20)
HARMLESS = (
    *("clean", "data stall of all", "evaluation of all", "checkpoint of one", "spike", "slow first step"),
    "suspended machine",
)
LAYOUTS = {
    "one rank per node": Layout(nodes=4, per_node=1, tp=1, pp=1),
    "two nodes": Layout(nodes=2, per_node=4, tp=2, pp=1),
    "deep pipeline": Layout(nodes=4, per_node=4, tp=1, pp=4),
}


@pytest.mark.parametrize("fault", CASES)
def test_fault_is_named(fault: str) -> None:
    (row,) = confusion(SEEDS[:2], Layout(), [fault])
    assert row.right == row.total, "\n".join(row.wrong)


@pytest.mark.slow
@pytest.mark.parametrize("fault", CASES)
def test_fault_is_named_wherever_it_is(fault: str) -> None:
    (row,) = confusion(SEEDS, Layout(), [fault])
    least = len(SEEDS) if fault in HARMLESS else 0.95 * len(SEEDS)
    assert row.right >= least, "\n".join(row.wrong)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fault", ["clean", "sleep before", "slow compute", "slow node", "spike", "evaluation of all"])
def test_other_meshes(fault: str, layout: str) -> None:
    (row,) = confusion(range(4), LAYOUTS[layout], [fault])
    assert row.right == row.total, "\n".join(row.wrong)


@pytest.mark.slow
def test_ten_thousand_clean_steps_accuse_nobody() -> None:
    (row,) = confusion(range(100, 350), Layout(nodes=2, per_node=4, tp=2, pp=1), ["clean"])
    assert row.right == row.total == 250, "\n".join(row.wrong)  # of 40 steps each
