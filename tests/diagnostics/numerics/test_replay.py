"""A step again, bit by bit: faults that came once, that come each time in another way, and always in the same one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import outlast.comm
from outlast.diagnostics.numerics import Replay, StepReplay
from outlast.errors import DiagnosticsError
from tests.comm.ranks import Ranks
from tests.diagnostics.numerics.test_not_finite import Net, batch


class Fault:
    """Adds one bit to an element of a gradient: in the first call, in each in another place, or in each in the same."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._calls = 0

    def __call__(self, grad: Tensor) -> Tensor:
        self._calls += 1
        if self._kind == "transient" and self._calls > 1:
            return grad
        bits = grad.clone().view(torch.int32)
        bits.view(-1)[self._calls if self._kind == "unstable" else 3] ^= 1 << 12
        return bits.view(torch.float32)


def replayed(rank: int, kinds: dict[int, str], how: str = "ddp", *, by_rank: bool = True) -> Replay:
    """A step with dropout, a replay, and that everything is as it was before the replay."""
    model = Net()
    torch.manual_seed(7 + rank)  # another dropout mask on each rank
    wrapped: nn.Module = DistributedDataParallel(model) if how != "alone" else model
    reducer = (
        outlast.comm.attach(wrapped, density=0.1, dense_below=8, target="gradient") if how == "compressed" else None
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if rank in kinds:
        model.blocks[2].linear.weight.register_hook(Fault(kinds[rank]))
    replay = StepReplay(wrapped, lambda of: wrapped(batch(of)), by_rank=by_rank)
    wrapped(batch(rank)).backward()
    optimizer.step()  # a replay may come after it
    state = {name: one.clone() for name, one in model.state_dict().items()}
    grads = [one.grad for one in model.parameters()]
    random = torch.get_rng_state()
    found = replay.run()
    assert all(torch.equal(state[name], one) for name, one in model.state_dict().items())
    assert all(one.grad is before for one, before in zip(model.parameters(), grads, strict=True))
    assert torch.equal(random, torch.get_rng_state())
    replay.close()
    if reducer is not None:
        reducer.close()
    return found


WEIGHT = "blocks.2.linear.weight"


def test_alone() -> None:
    assert replayed(0, {}, "alone").outcome == "same"
    transient = replayed(0, {0: "transient"}, "alone")
    assert (transient.outcome, transient.ranks, transient.parameter) == ("transient", (0,), WEIGHT)
    unstable = replayed(0, {0: "unstable"}, "alone")
    assert (unstable.outcome, unstable.ranks, unstable.parameter) == ("unstable", (0,), WEIGHT)
    # Alone, what is wrong each time is what the step is.
    assert replayed(0, {0: "persistent"}, "alone").outcome == "same"
    model = Net()
    replay = StepReplay(model, lambda rank: model(batch(rank)))
    with pytest.raises(DiagnosticsError, match=r"after 0 backward passes"):
        replay.run()
    for _ in range(2):
        model(batch()).backward()
    with pytest.raises(DiagnosticsError, match=r"after 2 backward passes .*(.|\n)*repeat one micro-batch"):
        replay.run()


@pytest.mark.parametrize(
    ("kinds", "outcome", "ranks"),
    [
        ({}, "same", ()),
        ({1: "transient"}, "transient", (1,)),
        ({2: "unstable"}, "unstable", (2,)),
        ({1: "persistent"}, "persistent", (1,)),
        ({0: "persistent"}, "persistent", (0,)),
        ({0: "persistent", 2: "unstable"}, "unstable", (2,)),
    ],
)
def test_ranks_find_the_same(three_ranks: Ranks, kinds: dict[int, str], outcome: str, ranks: tuple[int, ...]) -> None:
    for found in three_ranks.run(replayed, kinds):
        assert (found.outcome, found.ranks) == (outcome, ranks)
        assert found.parameter == (WEIGHT if kinds else "")
        assert found.told


def compressed_or_without_batches_of_others(rank: int) -> list[Replay]:
    return [
        replayed(rank, {1: "persistent"}, "compressed"),
        replayed(rank, {1: "persistent"}, by_rank=False),
        replayed(rank, {1: "transient"}, "compressed"),
    ]


def test_what_can_be_told_with_less(three_ranks: Ranks) -> None:
    for compressed, blind, once in three_ranks.run(compressed_or_without_batches_of_others):
        assert (compressed.outcome, compressed.ranks) == ("persistent", (1,))
        assert blind.outcome == "same"
        assert (once.outcome, once.ranks) == ("transient", (1,))


def refused(rank: int) -> str:
    model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (3,)))
    with pytest.raises(DiagnosticsError) as caught:
        StepReplay(model, lambda of: model(batch(of)))
    return str(caught.value)


def test_shards_are_refused(three_ranks: Ranks) -> None:
    for said in three_ranks.run(refused):
        assert "the model is sharded, and no rank has a gradient of its own" in said
