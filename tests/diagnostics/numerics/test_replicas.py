"""Replicas that must hold the same: a flipped bit is found, with the rank and the tensor; clean runs say nothing."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from outlast.diagnostics.numerics import NumericsConfig, NumericsEvent, NumericsWatch, ReplicasDifferent
from outlast.diagnostics.numerics.digests import Digests
from outlast.errors import ReplicasDiffer
from tests.comm.ranks import Ranks
from tests.diagnostics.numerics.test_not_finite import Net, batch


def flip(tensor: Tensor, place: int, bit: int) -> None:
    """One bit of one element, as a fault of the memory would."""
    with torch.no_grad():
        bits = getattr(tensor, "_local_tensor", tensor).detach().view(-1).view(torch.int32)
        bits[place] ^= 1 << bit if bit < 31 else -(1 << 31)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("shape", [(), (3,), (1024,), (70, 33), (0,)])
def test_a_digest_is_of_the_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (100 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    digests = Digests()
    assert digests.of([tensor]) == digests.of([tensor.clone()])
    assert digests.of([tensor.t() if tensor.dim() == 2 else tensor]) == Digests().of(
        [tensor.t().contiguous()] if tensor.dim() == 2 else [tensor]
    )
    if tensor.numel() > 1:
        assert digests.of([tensor]) != digests.of([tensor.flatten().roll(1)]) or len(tensor.unique()) == 1
    raw = tensor.reshape(-1).view(torch.uint8)
    before = digests.of([tensor])
    for place in {0, raw.numel() // 2, raw.numel() - 1} if raw.numel() else ():
        for bit in (0, 7) if dtype is not torch.bool else (0,):
            raw[place] ^= 1 << bit
            assert digests.of([tensor]) != before
            raw[place] ^= 1 << bit
    assert digests.of([tensor]) == before


def test_zero_and_minus_zero_and_nans_are_told_apart() -> None:
    one, other = torch.tensor([0.0, torch.nan]), torch.tensor([-0.0, torch.nan])
    assert Digests().of([one]) != Digests().of([other])
    assert Digests().of([other]) == Digests().of([other.clone()])


def trained(
    rank: int, ranks: list[int], flips: dict[int, tuple[str, int]], steps: int, action: Any = "tell"
) -> list[Any]:
    """Steps with a comparison after each second; bits are flipped after the update of step 4. What was told."""
    if rank not in ranks:
        return []
    model = Net()
    group = torch.distributed.new_group(ranks, use_local_synchronization=True) if len(ranks) < 3 else None
    wrapped = DistributedDataParallel(model, process_group=group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    told: list[NumericsEvent] = []
    config = NumericsConfig(replicas_every_steps=2, replicas_action=action)
    with NumericsWatch(wrapped, optimizer, config, on_event=told.append) as watch:
        assert watch.not_watched == []
        for step in range(1, steps + 1):
            wrapped(batch(rank)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 4 and rank in flips:
                name, bit = flips[rank]
                kind, _, of = name.partition(" of ")
                parameter = model.get_parameter(of or name)
                flip(optimizer.state[parameter][kind] if of else parameter, 5, bit)
            try:
                watch.end_step(loss=1.0)
            except ReplicasDiffer as error:
                return [*told, str(error)]
    return told


WEIGHT = "blocks.1.linear.weight"


@pytest.mark.parametrize("bit", [0, 22])
@pytest.mark.parametrize("name", [WEIGHT, f"exp_avg_sq of {WEIGHT}"])
def test_of_three_ranks_the_odd_one_is_named(three_ranks: Ranks, name: str, bit: int) -> None:
    for told in three_ranks.run(trained, [0, 1, 2], {1: (name, bit)}, 8):
        (event,) = told  # once, however long it lasts
        assert isinstance(event, ReplicasDifferent)
        assert (event.step, event.equal_at, event.ranks) == (4, 2, (1,))
        assert event.groups == ((0, 2), (1,))
        assert (event.parameter, event.count) == (name, 1)
        assert f"rank 1 differs from the other 2 of 3, in {name} (" in event.told
        assert "since a step after 2" in event.told


def test_of_two_ranks_it_is_said_that_they_differ_and_not_who(three_ranks: Ranks) -> None:
    one, other, _ = three_ranks.run(trained, [0, 1], {0: (WEIGHT, 3)}, 4)
    for event in (*one, *other):
        assert event.ranks == ()
        assert event.groups == ((0,), (1,))
        assert "ranks 0, 1 differ; of two, none is the odd one, in blocks.1.linear.weight" in event.told
    assert len(one) == len(other) == 1


def test_of_three_that_all_differ_none_is_named_and_stop_stops_all(three_ranks: Ranks) -> None:
    flips = {0: (WEIGHT, 3), 2: ("head.weight", 0)}
    for event, error in three_ranks.run(trained, [0, 1, 2], flips, 8, "stop"):
        assert event.ranks == ()
        assert event.groups == ((0,), (1,), (2,))
        assert (event.parameter, event.count) == (WEIGHT, 2)
        assert "the 3 ranks are in 3 groups, none of them a majority" in event.told
        assert event.told in error
        assert error.startswith("step 4: replicas are not the same")


def test_a_clean_run_says_nothing(three_ranks: Ranks) -> None:
    assert three_ranks.run(trained, [0, 1, 2], {}, 60) == [[], [], []]


def flipped_gradient(rank: int, when: str) -> list[NumericsEvent]:
    """Two steps; in the second, a bit of a gradient of rank 1 is flipped before the average is made, or after it."""
    model = Net()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    told: list[NumericsEvent] = []
    with NumericsWatch(wrapped, optimizer, NumericsConfig(replicas_every_steps=1), on_event=told.append) as watch:
        for step in (1, 2):
            if step == 2 and rank == 1 and when == "before":
                model.head.weight.register_hook(
                    lambda grad: grad.view(torch.int32).bitwise_xor(1 << 22).view(torch.float32)
                )
            wrapped(batch(rank)).backward()
            if step == 2 and rank == 1 and when == "after":
                assert model.head.weight.grad is not None
                flip(model.head.weight.grad, 2, 22)
            optimizer.step()
            optimizer.zero_grad()
            watch.end_step()
    return told


def test_a_bit_of_a_gradient_is_found_after_the_average_and_not_before(three_ranks: Ranks) -> None:
    """Before it, all ranks get the same wrong average, and stay the same: what compares replicas cannot see it."""
    assert three_ranks.run(flipped_gradient, "before") == [[], [], []]
    for told in three_ranks.run(flipped_gradient, "after"):
        (event,) = told
        assert isinstance(event, ReplicasDifferent)
        assert (event.ranks, event.parameter, event.count) == ((1,), "head.weight", 3)  # and both of its moments


def sharded(rank: int, mesh: tuple[int, ...]) -> tuple[list[NumericsEvent], list[str]]:
    model = Net()
    made = init_device_mesh("cpu", mesh, mesh_dim_names=("copy", "shard")[-len(mesh) :])
    for part in (*model.blocks, model):
        fully_shard(part, mesh=made)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    told: list[NumericsEvent] = []
    with NumericsWatch(model, optimizer, NumericsConfig(replicas_every_steps=1), on_event=told.append) as watch:
        for step in (1, 2):
            model(batch(rank)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 2 and rank == 1:
                flip(model.get_parameter(WEIGHT), 0, 3)
            watch.end_step()
        return told, watch.not_watched


def test_shards_have_no_replicas_unless_the_mesh_has_copies(three_ranks: Ranks) -> None:
    for told, not_watched in three_ranks.run(sharded, (3,)):
        assert told == []
        (why,) = not_watched
        assert why == (
            "replicas are not compared: FSDP2 shards parameters over all 3 ranks, and none has what another has"
        )
    for told, not_watched in three_ranks.run(sharded, (3, 1)):
        assert not_watched == []
        (event,) = told
        assert isinstance(event, ReplicasDifferent)
        assert (event.ranks, event.parameter) == ((1,), WEIGHT)


def zero(rank: int) -> tuple[list[NumericsEvent], list[str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it says of itself as it is imported
        from torch.distributed.optim import ZeroRedundancyOptimizer
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    wrapped = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
    told: list[NumericsEvent] = []
    with NumericsWatch(wrapped, optimizer, NumericsConfig(replicas_every_steps=1), on_event=told.append) as watch:
        for _ in range(2):
            wrapped(batch(rank)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            watch.end_step()
        return told, watch.not_watched


def test_an_optimizer_that_shares_its_state_out_is_left_out_by_name(three_ranks: Ranks) -> None:
    for told, not_watched in three_ranks.run(zero):
        assert told == []
        assert not_watched == [
            "optimizer state is not compared: each rank keeps a part of it, and none has what another has"
        ]


def with_experts(rank: int) -> tuple[list[NumericsEvent], list[str]]:
    model = Net()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["blocks.0.linear.bias"])
    with torch.no_grad():
        model.blocks[0].linear.bias += rank
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    told: list[NumericsEvent] = []
    with NumericsWatch(wrapped, optimizer, NumericsConfig(replicas_every_steps=1), on_event=told.append) as watch:
        for _ in range(2):
            wrapped(batch(rank)).backward()
            optimizer.step()
            optimizer.zero_grad()
            watch.end_step()
        return told, watch.not_watched


def test_what_each_rank_has_its_own_of_is_no_replica(three_ranks: Ranks) -> None:
    for told, not_watched in three_ranks.run(with_experts):
        assert told == []
        assert not_watched == ["not compared: blocks.0.linear.bias, which DDP was told to leave to each rank"]
