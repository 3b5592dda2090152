"""Every Python block of README, docs and docstrings runs, on two ranks over gloo; settings in TOML are read.

Commands run in ``tests/test_docs.py``. A block runs as it stands, but for the number of steps; what it takes for
granted is in ``preludes.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module, util
from pathlib import Path

import pytest

from outlast.config import load
from outlast.trainer.config import Config
from tests.comm.ranks import Ranks
from tests.docs.blocks import Block, all_blocks, looks_like_python

PRELUDES = {
    "docs/checkpointing.md: Reading without resuming": "saved_model",
    "docs/checkpointing.md: Sharded state": "sharded",
    "docs/checkpointing.md: The format (2)": "saved_run",
    "docs/compression.md: Steps": "adversaries",
    "docs/extending.md: A verb": "reported_run",
    "docs/extending.md: A report section": "reported_run",
    "outlast.checkpoint": "saved_run",
    "outlast.checkpoint.load.load": "saved_model",
}
"""What comes before a block, where it is neither ``loop`` nor seen from the block itself."""

ONE_RANK = ("docs/extending.md", "outlast.comm.testing")
"""Pages and modules whose examples need no second rank."""

NOT_RUN: dict[str, str] = {}
"""Examples that cannot run here, and why."""

BLOCKS = {block.name: block for block in all_blocks()}
EXAMPLES = [
    name
    for name, block in BLOCKS.items()
    if block.language == "python" or (not block.language and looks_like_python(block.code))
]


def prelude_of(block: Block) -> str:
    if block.name in PRELUDES:
        return PRELUDES[block.name]
    if "deepspeed.initialize" in block.code:
        return "deepspeed"
    return "unwrapped" if "fully_shard(" in block.code else "loop"


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[int, Ranks]]:
    """One rank, and two."""
    ranks = {size: Ranks(size) for size in (1, 2)}
    yield ranks
    for world in ranks.values():
        world.close()


def run(rank: int, block: Block, prelude: str, folder: str) -> None:
    """Run an example, the tests that it defines, and end what it began."""
    os.chdir(folder)
    names = dict(vars(import_module(block.module))) if block.module else {}
    names |= {"__name__": "example"} | getattr(import_module("tests.docs.preludes"), prelude)()
    given = set(names)
    code = re.sub(r"\b10[_,]?0[01]\b|\b1000[01]\b", "25", block.code)
    try:
        exec(compile(code, block.name, "exec", dont_inherit=True), names)
        for name in [name for name in names if name.startswith("test_")]:
            names[name]()
    finally:
        for name in ("checkpointer", "reducer"):
            if name in names and name not in given:
                with suppress(Exception):
                    names[name].close()


@pytest.mark.parametrize(
    "name", sorted(set(EXAMPLES) - set(NOT_RUN), key=lambda name: ("deepspeed" in BLOCKS[name].code, name))
)
def test_it_runs(worlds: dict[int, Ranks], tmp_path: Path, name: str) -> None:
    block = BLOCKS[name]
    prelude = prelude_of(block)
    if prelude == "deepspeed" and util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install 'outlast[deepspeed]'")
    worlds[1 if name.startswith(ONE_RANK) else 2].run(run, block, prelude, str(tmp_path))


@pytest.mark.parametrize("name", [name for name, block in BLOCKS.items() if block.language == "toml"])
def test_settings_are_read(tmp_path: Path, name: str) -> None:
    config = tmp_path / "config.toml"
    config.write_text(BLOCKS[name].code)
    load(Config, config, environ={})


def test_every_block_is_of_a_kind_that_is_run() -> None:
    """Commands in ``sh``; blocks without a language show files, output or formulas."""
    for block in BLOCKS.values():
        assert block.language in ("python", "sh", "toml", ""), f"{block.name}: {block.language}"


def test_what_is_listed_is_there() -> None:
    assert set(PRELUDES) | set(NOT_RUN) <= set(EXAMPLES)
    assert len(EXAMPLES) > 10
    assert all(len(reason) > 10 for reason in NOT_RUN.values())


@pytest.mark.parametrize(
    ("code", "python"),
    [
        ("reducer = attach(ddp)", True),
        ("reducer = attach(ddp, density=0.05)", True),
        ("with x as y:\n    ...", True),
        ("e_i' = e_i + g_i - C(e_i + g_i)", False),
        ("outlast train CONFIG [--resume R]", False),
        ("model.train()", True),
    ],
)
def test_what_looks_like_python(code: str, python: bool) -> None:
    assert looks_like_python(code) == python
