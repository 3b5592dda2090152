"""transformers' GPT-2 under DDP, from ``configs/gpt2.toml``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.foreign import assert_ends_the_same_when_killed


@pytest.mark.slow
def test_killed_and_resumed_it_ends_the_same(tmp_path: Path) -> None:
    assert_ends_the_same_when_killed(tmp_path)
