"""A process that ends without closing its Checkpointer: what is complete and unchanged is committed, and the rest said.

The processes are real: they are forked from one that has PyTorch, and end as any program does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from outlast.checkpoint.tools import list_steps, verify

ROOT = Path(__file__).parents[3]
NOTHING = ""
BROKE = "ValueError: training broke"
TOO_LARGE = "step 3 is not durable (the newest that is: step 2): OSError: [Errno 27] File too large"
EXPECTED: dict[str, tuple[int, list[int], str]] = {
    # how it ends: its status, the steps that are committed, and what it says last
    "falls_off": (0, [1, 2], NOTHING),
    "leaves_with_0": (0, [1, 2], NOTHING),
    "leaves_with_3": (3, [1, 2], NOTHING),
    "raises": (1, [1, 2], BROKE),
    "has_a_memory_tier": (0, [1, 2], NOTHING),
    "trains_in_a_thread": (0, [2, 3, 4], NOTHING),
    "trains_in_a_pool": (0, [2, 3, 4], NOTHING),
    "trains_in_a_daemon_thread": (0, [2, 3, 4], NOTHING),
    "rank_0_destroys_its_group": (0, [1, 2], NOTHING),
    "rank_1_leaves_with_1": (1, [1, 2], NOTHING),
    "reads_and_leaves": (0, [], NOTHING),
    "reads_and_outlives_it": (0, [], NOTHING),
    "forks": (0, [1, 2, 3], NOTHING),
    "with_leaves_with_0": (0, [1, 2], NOTHING),
    "with_raises": (1, [1, 2], BROKE),
    "with_is_interrupted": (-2, [1, 2], "KeyboardInterrupt"),
    "changes": (1, [1], "step 2 is not durable (the newest that is: step 1)"),
    "waits_for_a_rank_that_is_gone": (1, [], "the process ended before the checkpoint was committed within 0.3 s"),
    "fails": (1, [1, 2], "step 3 is not durable (the newest that is: step 2)"),
    "fails_and_closes": (1, [1, 2], f"outlast.errors.NotDurable: {TOO_LARGE}"),
    "fails_in_a_with_that_raises": (1, [1, 2], BROKE),
    "fails_before_it_succeeds": (0, [1, 2, 4], "checkpoint of step 3 failed: [Errno 27] File too large"),
}


def test_every_way_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.checkpoint.save.endings", str(tmp_path), *EXPECTED]
    done = subprocess.run(command, timeout=240, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found, wanted, said = {}, {}, {}
    for way, status in json.loads(done.stdout).items():
        place = tmp_path / {"rank": "two", "reads": "reads"}.get(way.partition("_")[0], way)
        steps = [info.step for info in list_steps(place) if info.status == "committed"]
        assert all(verify(place, step).ok for step in steps)
        found[way] = status, steps
        wanted[way] = EXPECTED[way][:2]
        said[way] = (tmp_path / f"{way}.said").read_text()
    assert found == wanted
    for way, (_, _, last) in EXPECTED.items():
        if last:
            assert any(last in line for line in said[way].splitlines()[-2:]), (way, said[way])
        else:
            assert "checkpoint" not in said[way], said[way]
    assert said["fails_in_a_with_that_raises"].count("step 3 failed") == 1
    assert not any("training ended" in text for text in said.values())
