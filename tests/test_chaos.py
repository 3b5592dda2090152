"""Ranks and nodes lost at random: the run ends as one that lost none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import clean_env


@pytest.mark.root
@pytest.mark.slow
def test_a_run_that_loses_ranks_and_nodes(root: Path, tmp_path: Path) -> None:
    """`python -m benchmarks.chaos --kills 100` is the long one."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.chaos",
        "--kills",
        "5",
        "--seed",
        "17",
        "--json",
        tmp_path / "out.json",
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=280, env=clean_env())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["bit_identical"]
    assert told["kills"] == 5
    assert told["nodes_lost_with_their_memory"] == 2
    assert told["all_memory_lost"] == 1
    assert told["restarts_behind_what_was_saved"] == 0
    assert told["restores_by_slowest_tier_used"].keys() <= {"memory", "partner", "local"}
    # An interval, and what was done while a copy was on its way.
    assert told["most_steps_done_again"]["a node's"] < 2 * told["interval_steps"]["partner"]
    assert told["most_steps_done_again"]["all"] < 2 * told["interval_steps"]["local"]
    assert all(sum(kill["tiers"].values()) > 0 for kill in told["each"])
