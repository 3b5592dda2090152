"""transformers' GPT-2 under FSDP2, its gradients compressed, from ``configs/gpt2.toml``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.foreign import assert_ends_the_same_when_killed, train

COMPRESSED = ["--comm.target=gradient", "--comm.feedback=ef21", "--comm.density=0.05", "--comm.dense-below=64"]


@pytest.mark.soak
def test_killed_and_resumed_it_ends_the_same(tmp_path: Path) -> None:
    words = ["--trainer.engine", "fsdp2", *COMPRESSED]
    assert_ends_the_same_when_killed(tmp_path, *words)
    more = ["--run.resume", "auto", "--trainer.steps", "8", "--model.factory", "killed_gpt2:Killed"]
    told = train(tmp_path, "straight", *words, *more, ranks=1, check=1)
    assert "state of 2 ranks cannot be redistributed over 1 ranks: FSDP2" in told, told[-3000:]
