"""The ordered communicator: rank-order sums, and errors that do not get lost."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from outlast.comm import Communicator
from outlast.errors import CommError
from tests.comm.ranks import Ranks
from tests.comm.toy import rank_order_mean


def data(rank: int, numel: int) -> torch.Tensor:
    # Magnitudes that differ, so that another order of summation gives other bits.
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(numel, generator=generator) * 10.0 ** torch.randint(-6, 6, (numel,), generator=generator)


def run_means(rank: int, sizes: list[int]) -> list[bytes]:
    communicator = Communicator()

    def mean(numel: int) -> torch.Tensor:
        return communicator.mean(data(rank, numel), f"size {numel}")

    futures = [communicator.submit(partial(mean, numel)) for numel in sizes]
    means = [future.result(60) for future in futures]
    payload = torch.tensor([rank, 2 * rank], dtype=torch.uint8)
    gathered = communicator.submit(lambda: communicator.all_gather(payload, "payload")).result(60)
    assert gathered.tolist() == [[r, 2 * r] for r in range(communicator.world_size)]
    assert communicator.take_totals().collectives == 2 * len(sizes) + 1
    assert communicator.take_totals().collectives == 0
    communicator.close()
    return [mean.numpy().tobytes() for mean in means]


def test_means_are_sums_in_rank_order(three_ranks: Ranks) -> None:
    sizes = [1, 2, 3, 4, 1000, 70_001]
    expected = [rank_order_mean([data(rank, n) for rank in range(3)]).numpy().tobytes() for n in sizes]
    assert three_ranks.run(run_means, sizes) == [expected] * 3


def run_failing_job(rank: int) -> bool:
    communicator = Communicator()

    def fail() -> None:
        raise ValueError("first")

    ran: list[int] = []
    futures = [communicator.submit(fail), communicator.submit(lambda: ran.append(1))]
    for future in futures:
        with pytest.raises(ValueError, match="first"):
            future.result(60)
    communicator.close()
    communicator.close()
    with pytest.raises(CommError, match="after close"):
        communicator.submit(fail)
    with pytest.raises(CommError, match="closed"):
        _ = communicator.group
    return not ran


def test_jobs_behind_a_failed_one_do_not_run(three_ranks: Ranks) -> None:
    assert all(three_ranks.run(run_failing_job))
