"""On which rank values were not finite first: real ranks, whose gradients are averaged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from outlast.diagnostics.numerics import NotFinite, NumericsEvent, NumericsWatch
from outlast.errors import TrainingDiverged
from tests.comm.ranks import Ranks
from tests.diagnostics.numerics.test_not_finite import Net, Root, batch, spoiled


def diverging(rank: int, how: str, culprits: list[int]) -> tuple[str, list[NotFinite], bool]:
    """The error, what was told, and whether the weights are as they were."""
    model = Net()
    wrapped: nn.Module = model
    if how == "fsdp2":
        for part in (*model.blocks, model):
            fully_shard(part, mesh=init_device_mesh("cpu", (3,)))
    else:
        wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    found: list[NumericsEvent] = []
    with NumericsWatch(wrapped, optimizer, on_event=found.append) as watch:
        wrapped(batch(rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.end_step()
        before = [one.detach().clone() for one in model.parameters()]
        if rank in culprits:
            in_backward = how == "backward" or (how == "fsdp2" and rank == 0)
            model.blocks[1].spoil = Root.apply if in_backward else spoiled(float("nan"))
        wrapped(batch(rank)).backward()
        with pytest.raises(TrainingDiverged) as caught:
            optimizer.step()
    same = all(torch.equal(local(a), local(b)) for a, b in zip(before, model.parameters(), strict=True))
    return str(caught.value), [one for one in found if isinstance(one, NotFinite)], same


def local(tensor: Any) -> Any:
    return getattr(tensor, "_local_tensor", tensor)


@pytest.mark.parametrize(
    ("how", "culprits", "module", "words"),
    [
        ("ddp", [1], "blocks.1", "blocks.1 (Faulty), on rank 1 alone: its inputs are finite"),
        ("ddp", [0, 2], "blocks.1", "blocks.1 (Faulty), on ranks 0, 2 of 3: its inputs are finite"),
        ("ddp", [0, 1, 2], "blocks.1", "on all 3 ranks, so the model or its data are at fault, and no rank"),
        ("backward", [2], "", "in backward the first gradient that is not is that of blocks.1.linear.bias, on rank 2"),
        ("fsdp2", [1], "blocks.1", "(FSDPFaulty), on rank 1 alone: its inputs are finite"),
        ("fsdp2", [0], "", "forward, run again, is finite on all ranks: what happened came after it"),
    ],
    ids=["one", "two", "all", "backward", "sharded", "sharded_backward"],
)
def test_all_ranks_name_the_first(three_ranks: Ranks, how: str, culprits: list[int], module: str, words: str) -> None:
    for said, events, same in three_ranks.run(diverging, how, culprits):
        assert words in said
        assert "step 2: the gradient norm is nan; the parameters were not updated" in said
        assert [(one.step, one.module, one.transient) for one in events] == [(2, module, False)]
        assert events[0].ranks == (() if how == "fsdp2" and not module else tuple(culprits))
        assert same
