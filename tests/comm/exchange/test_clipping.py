"""torch's clipping on averaged updates is an error before it scales them; elsewhere it is torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.utils.clip_grad as torch_clipping
from torch import Tensor, nn, optim
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from outlast.comm import CommConfig, GradientReducer, attach
from outlast.errors import CommError
from tests.comm.ranks import Ranks

UPDATE: dict[str, Any] = {"density": 0.2, "dense_below": 10, "timeout_s": 30.0, "target": "update"}


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))


def backward(model: nn.Module, rank: int) -> None:
    model(torch.randn(4, 12, generator=torch.Generator().manual_seed(rank))).square().mean().backward()


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]


def norm(model: nn.Module) -> Any:
    return clip_grad_norm_(model.parameters(), 1.0)


def norm_inf_foreach(model: nn.Module) -> Any:
    return torch.nn.utils.clip_grad_norm_(list(model.parameters()), 0.01, norm_type=float("inf"), foreach=True)


def one_by_one(model: nn.Module) -> Any:
    return [torch.nn.utils.clip_grad_norm_(p, 1e-3) for p in model.parameters()]


def in_two_calls(model: nn.Module) -> Any:
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    return torch.nn.utils.clip_grads_with_norm_(iter(list(model.parameters())), 1.0, total)


def value(model: nn.Module) -> Any:
    return clip_grad_value_(model.parameters(), 0.05)


WAYS: list[tuple[Callable[[nn.Module], Any], str]] = [
    (norm, "clip_grad_norm_"),
    (norm_inf_foreach, "clip_grad_norm_"),
    (one_by_one, "clip_grad_norm_"),
    (in_two_calls, "clip_grad_norm_"),
    (value, "clip_grad_value_"),
]


def run_clipped(rank: int) -> None:
    inner = torch_clipping._group_tensors_by_device_and_dtype
    model, plain = net(), net()
    ddp = DistributedDataParallel(model)
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    backward(plain, rank)
    with attach(ddp, **UPDATE):
        for clip, name in WAYS:
            optimizer.zero_grad()
            backward(ddp, rank)
            before = grads(model)
            with pytest.raises(CommError, match=rf"torch\.nn\.utils\.{name} on averaged updates .*weight") as caught:
                clip(model)
            assert "clip_rms" in caught.value.fix
            assert all(map(torch.equal, before, grads(model)))
            # What scales nothing down is let by: a norm that is only asked for, and a limit that is not reached.
            assert float(clip_grad_norm_(model.parameters(), float("inf"))) > 0.1
            clip_grad_norm_(model.parameters(), 1e9)
            clip_grad_value_(model.parameters(), 1e9)
            assert all(map(torch.equal, before, grads(model)))
            clip(plain)  # other models are clipped
            optimizer.step()
        assert float(torch.nn.utils.get_total_norm(grads(plain))) < 1
        optimizer.zero_grad()
        with ddp.no_sync():
            backward(ddp, rank)
        clip_grad_norm_(model.parameters(), 1e-3)  # this rank's own gradient, which is not averaged yet
    assert torch_clipping._group_tensors_by_device_and_dtype is inner


def test_under_ddp(two_ranks: Ranks) -> None:
    two_ranks.run(run_clipped)


def run_others(rank: int) -> None:
    """FSDP2; a loop without a wrapper; and gradients, which are clipped as ever."""
    sharded = net()
    fully_shard(sharded)
    with attach(sharded, **UPDATE):
        backward(sharded, rank)
        for clip, _ in WAYS[:1] + WAYS[-1:]:
            with pytest.raises(CommError, match="on averaged updates"):
                clip(sharded)
        assert clip_grad_norm_(sharded.parameters(), float("inf")).full_tensor() > 0.1
    bare = net()
    with GradientReducer(bare.named_parameters(), CommConfig(**UPDATE)) as reducer:
        backward(bare, rank)
        clip_grad_norm_(bare.parameters(), 1e-3)
        reducer.reduce()
        with pytest.raises(CommError, match="on averaged updates"):
            norm(bare)
    ddp = DistributedDataParallel(net())
    with attach(ddp, **{**UPDATE, "target": "gradient"}):
        backward(ddp, rank)
        clip_grad_norm_(ddp.parameters(), 1e-3)
        assert float(torch.nn.utils.get_total_norm(grads(ddp))) < 1.1e-3


def test_elsewhere(two_ranks: Ranks) -> None:
    two_ranks.run(run_others)
