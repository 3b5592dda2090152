"""Loops in the docs that restore, killed on all ranks and started again, end like one that was not, bit for bit.

Dropout is on, and each start has the same random numbers first, so that what a loop forgets to save makes a difference.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.comm.ranks import Ranks
from tests.docs.blocks import Block, all_blocks
from tests.docs.preludes import Names
from tests.docs.test_examples import prelude_of, run

LAST, SAVED, KILLED = 25, 10, 14
"""Of steps: before which a loop ends, saved, and in which it is killed."""

TRAINS = re.compile(r"\.(restore|load_checkpoint)\(.*10|session\.(steps|begin)\(1000\)", flags=re.DOTALL)
RECIPES = {block.name: block for block in all_blocks() if block.language == "python" and TRAINS.search(block.code)}


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def digest(names: Names) -> str:
    """Of all that a loop leaves: parameters, optimizer, scheduler, compression, and the next random number."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.to_local() if hasattr(value, "to_local") else value
            found.update(value.detach().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                found.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for one in value:
                add(one)
        else:
            found.update(repr(value).encode())

    for name in ("model", "optimizer", "scheduler", "scaler", "ema"):
        if name in names:
            add(names[name].state_dict())
    add(torch.rand(1))
    return found.hexdigest()


class Watched:
    """The loss, or the batch, of a step, for which a loop asks in each: it notes the steps, and may kill the rank."""

    def __init__(self, wrapped: Any, kill: bool) -> None:
        self.wrapped, self.kill = wrapped, kill
        self.steps: list[int] = []

    def __call__(self, *args: Any) -> Any:
        step = int(args[-1])
        self.steps.append(step)
        if self.kill and step >= self.killed_in:
            waited_until = time.monotonic() + 30
            while not list(Path("runs").rglob("commit.json")):  # what the ranks go on from
                assert time.monotonic() < waited_until
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.wrapped(*args)

    killed_in = KILLED


def train(rank: int, block: Block, prelude: str, folder: str, kill: bool) -> tuple[int, str]:
    """Run a loop: the first step that it took, and a digest of what it left."""
    asked = "batch" if "batch(step)" in block.code else "loss"
    per_step = 4 if "4 * step + micro" in block.code else 1
    watched: list[Watched] = []

    def prepare(names: Names) -> None:
        watched.append(Watched(names[asked], kill))
        watched[0].killed_in = KILLED * per_step
        names[asked] = watched[0]

    left = run(rank, block, prelude, folder, prepare)
    return watched[0].steps[0] // per_step, digest(left)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * ("deepspeed" in RECIPES[name].code)) for name in sorted(RECIPES)],
)
def test_killed_and_started_again_it_ends_the_same(two_ranks: Ranks, tmp_path: Path, name: str) -> None:
    block = RECIPES[name]
    prelude = prelude_of(block)
    if prelude == "deepspeed" and util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install 'outlast[deepspeed]'")
    for folder in ("straight", "killed"):
        (tmp_path / folder).mkdir()
    straight = two_ranks.run(train, block, prelude, str(tmp_path / "straight"), False)
    assert [first for first, _ in straight] == [1, 1]
    with pytest.raises(AssertionError):
        two_ranks.run(train, block, prelude, str(tmp_path / "killed"), True)
    resumed = two_ranks.run(train, block, prelude, str(tmp_path / "killed"), False)
    assert [first for first, _ in resumed] == [SAVED + 1] * 2
    assert [left for _, left in resumed] == [left for _, left in straight]


def test_the_loops_are_found() -> None:
    assert {name.partition(":")[0] for name in RECIPES} >= {"README.md", "docs/checkpointing.md", "docs/loop.md"}
    assert len(RECIPES) >= 7


def test_a_loop_that_forgets_its_random_numbers_is_found_out(two_ranks: Ranks, tmp_path: Path) -> None:
    """What is compared depends on what is saved."""
    block = next(block for name, block in RECIPES.items() if name.startswith("docs/loop.md: The loop"))
    code = block.code.replace('load_rng_state(restored.local["rng"])', "pass")
    assert code != block.code
    forgetful = Block(block.name, block.language, code)
    ended = []
    for folder, kill in (("straight", False), ("killed", True), ("killed", False)):
        (tmp_path / folder).mkdir(exist_ok=True)
        if kill:
            with pytest.raises(AssertionError):
                two_ranks.run(train, forgetful, "loop", str(tmp_path / folder), True)
        else:
            ended.append(two_ranks.run(train, forgetful, "loop", str(tmp_path / folder), False))
    assert ended[1][0][0] == SAVED + 1
    assert ended[0][0][1] != ended[1][0][1]
