"""A world that fails says everything, and the next call has a new one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.comm import ranks as module
from tests.comm.ranks import Ranks


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setattr(module, "GRACE_S", 1.0)
    ranks = Ranks(3, prepare=prepared)
    yield ranks
    ranks.close()


def prepared(rank: int) -> None:
    os.environ["PREPARED"] = str(rank)


def summed(rank: int) -> tuple[float, int, str]:
    x = torch.tensor([float(rank)])
    dist.all_reduce(x)
    return float(x), os.getpid(), os.environ["PREPARED"]


def go_wrong(rank: int) -> None:
    if rank == 0:
        raise ValueError("this is what was wrong")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    os.write(2, b"the last words of rank 2\n")
    time.sleep(60)


def late(rank: int) -> None:
    if rank == 2:
        time.sleep(60)


def test_a_failure_tells_of_every_rank_and_costs_one_call(three: Ranks) -> None:
    before = three.run(summed)
    assert [(total, told) for total, _, told in before] == [(3.0, "0"), (3.0, "1"), (3.0, "2")]
    with pytest.raises(AssertionError) as caught:
        three.run(go_wrong)
    said = str(caught.value)
    assert "rank 0: raised" in said
    assert "ValueError: this is what was wrong" in said
    assert "rank 1: ended with exit code -9 (SIGKILL)" in said
    assert "rank 2: has not answered" in said
    assert "the last words of rank 2" in said
    assert "in go_wrong" in said.partition("rank 2 wrote to stderr")[2], "the stacks of who is stuck"
    after = three.run(summed)
    assert [(total, told) for total, _, told in after] == [(3.0, "0"), (3.0, "1"), (3.0, "2")]
    assert not {pid for _, pid, _ in before} & {pid for _, pid, _ in after}


def test_who_does_not_answer_in_time_is_named() -> None:
    ranks = Ranks(3, limit_s=1.0)
    with pytest.raises(AssertionError) as caught:
        ranks.run(late)
    said = str(caught.value)
    assert "rank 0: done\nrank 1: done\nrank 2: has not answered" in said
    assert "in late" in said


def test_an_answer_may_be_had_though_another_rank_is_dead() -> None:
    ranks = Ranks(2)
    try:
        ranks.start(one_dies)
        assert ranks.result(0) == "alive"
        with pytest.raises(AssertionError, match=r"(?s)rank 0: done.*rank 1: ended with exit code -9"):
            ranks.result(1)
    finally:
        ranks.close()


def one_dies(rank: int) -> str:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"
