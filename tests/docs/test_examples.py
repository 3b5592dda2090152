"""Every Python block of README, docs and docstrings runs, on two ranks over gloo; settings in TOML are read.

Commands run in ``tests/test_docs.py``. A block runs as it stands, but for the number of steps; what it takes for
granted is in ``preludes.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module, util
from pathlib import Path
from typing import Any

import pytest

from outlast.config import load
from outlast.trainer.config import Config
from tests.checkpoint.s3 import Server
from tests.comm.ranks import Ranks
from tests.docs.blocks import Block, all_blocks, looks_like_python

PRELUDES = {
    "docs/checkpointing.md: Reading without resuming": "saved_model",
    "docs/checkpointing.md: Sharded state": "sharded",
    "docs/checkpointing.md: The format (2)": "saved_run",
    "docs/compression.md: Steps": "adversaries",
    "docs/extending.md: A verb": "reported_run",
    "docs/howto.md: Read the weights alone, in a notebook": "saved_model",
    "docs/howto.md: Resume with another learning rate (2)": "saved_model",
    "docs/extending.md: A report section": "reported_run",
    "outlast.checkpoint": "saved_run",
    "outlast.checkpoint.load.load": "saved_model",
}
"""What comes before a block, where it is neither ``loop`` nor seen from the block itself."""

ONE_RANK = ("docs/extending.md", "outlast.comm.testing")
"""Pages and modules whose examples need no second rank."""

NOT_RUN: dict[str, str] = {
    "outlast.checkpoint.deepspeed.state.DeepSpeedState": "a part of what attach, whose examples run, does with it",
    "outlast.integrations.lightning": "a program of its own: tests/integrations/test_examples.py runs the whole of it",
}
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


@contextmanager
def bucket() -> Iterator[dict[str, str]]:
    """An S3 server with an empty bucket of that name, and what a reader has in the environment."""
    if util.find_spec("moto") is None or util.find_spec("s3fs") is None:
        pytest.skip("moto and s3fs are not installed: pip install 'outlast[s3,test]'")
    server = Server()
    try:
        server.start()
        yield {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    finally:
        server.kill()


def run(
    rank: int, block: Block, prelude: str, folder: str, prepare: Callable[[dict[str, Any]], None] = lambda names: None
) -> dict[str, Any]:
    """Run an example, the tests that it defines, and end what it began; its names.

    Args:
        rank: of this process.
        block: the example.
        prelude: what comes before it.
        folder: where it runs.
        prepare: changes the names that it is given.
    """
    os.chdir(folder)
    names = dict(vars(import_module(block.module))) if block.module else {}
    names |= {"__name__": "example"} | getattr(import_module("tests.docs.preludes"), prelude)()
    prepare(names)
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
    return names


def example(rank: int, block: Block, prelude: str, folder: str, environment: dict[str, str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        run(rank, block, prelude, folder)


@pytest.mark.parametrize(
    "name", sorted(set(EXAMPLES) - set(NOT_RUN), key=lambda name: ("deepspeed" in BLOCKS[name].code, name))
)
def test_it_runs(worlds: dict[int, Ranks], tmp_path: Path, name: str) -> None:
    block = BLOCKS[name]
    prelude = prelude_of(block)
    if prelude == "deepspeed" and util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install 'outlast[deepspeed]'")
    with ExitStack() as stack:
        environment = stack.enter_context(bucket()) if "s3://" in block.code else {}
        worlds[1 if name.startswith(ONE_RANK) else 2].run(example, block, prelude, str(tmp_path), environment)


@pytest.mark.parametrize("name", [name for name, block in BLOCKS.items() if block.language == "toml"])
def test_settings_are_read(tmp_path: Path, name: str) -> None:
    config = tmp_path / "config.toml"
    config.write_text(BLOCKS[name].code)
    load(Config, config, environ={})


def test_every_block_is_of_a_kind_that_is_run() -> None:
    """Commands in ``sh``; ``diff`` is held to the examples by tests/integrations/test_examples.py; blocks without a
    language show files, output or formulas."""
    for block in BLOCKS.values():
        assert block.language in ("python", "sh", "toml", "diff", ""), f"{block.name}: {block.language}"


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
