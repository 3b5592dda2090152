"""transformers' GPT-2 under DeepSpeed's ZeRO 3, from ``configs/gpt2.toml``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.trainer.foreign import assert_ends_the_same_when_killed

WITHOUT_OPERATORS = """
import deepspeed.ops
deepspeed.ops.__compatible_ops__ = {}  # else it compiles for a minute what nothing here calls
"""


@pytest.mark.soak
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_killed_and_resumed_it_ends_the_same(tmp_path: Path) -> None:
    settings = tmp_path / "ds.json"
    settings.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    words = ["--trainer.engine", "deepspeed", "--deepspeed.config", str(settings), "--comm.compressor", "dense"]
    assert_ends_the_same_when_killed(tmp_path, *words, before=WITHOUT_OPERATORS)
