"""Being watched changes no result: what PyTorch's tests do with DDP, FSDP and FSDP2 comes to the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.forked import run_main
from tests.helpers import clean_env, outlast

PROGRAM = Path(__file__).with_name("situations.py")


@pytest.mark.slow
def test_in_every_situation(tmp_path: Path) -> None:
    alone, watched = tmp_path / "alone", tmp_path / "watched"
    alone.mkdir(), watched.mkdir()
    words = ["--standalone", "--nproc-per-node", "2", str(PROGRAM), str(alone)]
    done = run_main("torch.distributed.run", words, env=clean_env(), timeout_s=300)
    assert done.returncode == 0, done.stderr[-3000:]
    outlast("launch", "--nproc-per-node", "2", "--run-dir", tmp_path / "run", PROGRAM, watched)
    for rank in range(2):
        expected, found = (json.loads((folder / f"rank_{rank}.json").read_text()) for folder in (alone, watched))
        assert found == expected
        assert len(expected) == PROGRAM.read_text().count("@situation\n")
        failed = [name for name, said in expected.items() if " " in said]
        assert failed == ["ddp_unused_parameters_that_nobody_announced"], expected
