"""A plain DDP script in which one rank skips a collective: over gloo its peers, or it, die of that at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import clean_env, events, outlast

SKIPS = """
import os, sys
import torch, torch.distributed as dist
who, size, at = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo")
rank = dist.get_rank()
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(12):
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    if not (step == at and rank == who and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"):
        dist.all_reduce(torch.ones(size))
print("rank", rank, "is done", flush=True)
dist.destroy_process_group()
"""


def run(tmp_path: Path, who: int, size: int, at: int, ranks: int = 2) -> tuple[str, str]:
    """The launcher's words, and the first reason it gives."""
    script = tmp_path / "train.py"
    script.write_text(SKIPS)
    words = ["launch", "--nproc-per-node", str(ranks), "--run-dir", tmp_path / "run", script, who, size, at]
    done = outlast(*map(str, words), env=clean_env())
    assert "rank 0 is done" in done.stdout, done.stderr
    (failed,) = events(tmp_path / "run", "workers_failed")
    assert failed["ranks"][0] == who, failed.fields
    return done.stderr, failed["reasons"][0]


def test_the_peer_is_aborted(tmp_path: Path) -> None:
    """What comes next is larger, so it is rank 0 that dies of it, and nothing but SIGABRT was told of."""
    said, reason = run(tmp_path, 1, 4, 6)
    assert "desynchronised: rank 1 left the order of collectives" in reason
    assert "was all_reduce of 16640 bytes in step 8, where all_reduce of 16 bytes" in reason
    assert "rank 0, which kept to it, was aborted" in reason
    assert reason in said
    headline = outlast("report", tmp_path / "run").stdout.splitlines()[0]
    assert headline.startswith("Rank 1")
    assert "desynchronised" in headline


@pytest.mark.soak
def test_the_rank_itself_is_aborted(tmp_path: Path) -> None:
    """What comes next is smaller, so it dies of what its peer sends."""
    _, reason = run(tmp_path, 1, 100_000, 6)
    assert "desynchronised: rank 1 left the order of collectives" in reason
    assert "its peers' collective #" in reason
    assert "was all_reduce of 400000 bytes in step 8" in reason
    assert "killed by SIGABRT" in reason


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, pytest.param(100_000, marks=pytest.mark.soak)])
def test_of_three_the_one_that_is_alone(tmp_path: Path, size: int) -> None:
    _, reason = run(tmp_path, 1, size, 6, ranks=3)
    assert "desynchronised" in reason
    assert "rank 1 left the order" in reason


def test_of_equal_size_it_is_found_where_it_ends(tmp_path: Path) -> None:
    """Nothing fails meanwhile, though sums are wrong: the rank is one collective ahead, and ends first."""
    _, reason = run(tmp_path, 1, 4160, 6)
    assert "exited with status 0 after step 12" in reason
