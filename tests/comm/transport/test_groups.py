"""Process groups under names that all members agree on, whatever their processes did before."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from outlast.comm import CommConfig, attach
from outlast.comm.transport.groups import open_group
from outlast.errors import CommError
from tests.comm.ranks import Ranks

SETTINGS: dict[str, Any] = {"target": "gradient", "density": 1.0, "values": "fp32", "dense_below": 1, "timeout_s": 15.0}


def averaged(rank: int, group: Any, ranks: list[int], **settings: Any) -> None:
    ddp = DistributedDataParallel(nn.Linear(6, 6, bias=False), process_group=group)
    with attach(ddp, CommConfig(**{**SETTINGS, **settings})):
        ddp(torch.full((1, 6), float(rank))).sum().backward()
    assert torch.equal(ddp.module.weight.grad, torch.full((6, 6), sum(ranks) / len(ranks)))


def alone(rank: int) -> None:
    """Rank 0 has made three groups that the others know nothing of."""
    if rank == 0:
        for _ in range(3):
            dist.new_group([0], use_local_synchronization=True)


def in_a_pair(rank: int) -> None:
    """Two ranks have made a group, and one of them has destroyed it."""
    if rank != 2:
        pair = dist.new_group([0, 1], use_local_synchronization=True)
        dist.barrier(pair)  # whoever destroys it must not do so while the other still connects
        if rank == 1:
            dist.destroy_process_group(pair)


def in_a_reducer(rank: int) -> None:
    """Two ranks have compressed among themselves, and closed."""
    if rank != 0:
        pair = dist.new_group([1, 2], use_local_synchronization=True)
        averaged(rank, pair, [1, 2])


def run_after(rank: int, before: Callable[[int], None]) -> None:
    before(rank)
    averaged(rank, None, [0, 1, 2])
    mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("dp",))
    averaged(rank, mesh.get_group("dp"), [0, 1, 2])
    averaged(rank, mesh.get_group("dp"), [0, 1, 2], ranks_per_node=3)
    pair = dist.new_group([0, 2])
    for _ in range(2):  # a group that is made again does not look for the first one's addresses
        if rank != 1:
            averaged(rank, pair, [0, 2])


@pytest.mark.parametrize("before", [alone, in_a_pair, in_a_reducer])
def test_what_a_process_did_before_does_not_matter(before: Callable[[int], None]) -> None:
    ranks = Ranks(3)  # torch's own groups, which a test makes beside, must find one another afterwards
    try:
        ranks.run(run_after, before)
    finally:
        ranks.close()


def run_without_one(rank: int) -> tuple[str, float]:
    if rank == 2:
        time.sleep(6)
        return "", 0.0
    started = time.monotonic()
    with pytest.raises(CommError) as caught:
        open_group("outlast-test", [0, 1, 2], "gloo", 2.0)
    return str(caught.value), time.monotonic() - started


def test_a_rank_that_does_not_come_is_an_error_of_ours() -> None:
    ranks = Ranks(3)
    try:
        found = ranks.run(run_without_one)
    finally:
        ranks.close()
    for said, seconds in found[:2]:
        assert "attach() is a collective call" in said
        assert "comm.timeout_s = 2" in said
        assert "ranks 2 did not come" in said
        assert seconds < 60
