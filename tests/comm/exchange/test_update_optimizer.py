"""With ``target = "update"`` the optimizer is plain SGD; any other one is an error before it changes a parameter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from outlast.comm import CommConfig, GradientReducer, attach
from outlast.errors import CommError
from tests.comm.ranks import Ranks

SMALL: dict[str, Any] = {"density": 0.2, "dense_below": 10, "timeout_s": 30.0}
UPDATE: dict[str, Any] = {**SMALL, "target": "update"}
GRADIENT: dict[str, Any] = {**SMALL, "target": "gradient", "feedback": "ef21"}


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


class OwnSGD(optim.SGD):
    """A subclass is taken for what it is called."""


class Own(optim.Optimizer):
    """Nobody can know what it does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        raise AssertionError("it must not be reached")


class Several(optim.Optimizer):
    """Of which each has some of the parameters."""

    def __init__(self, params: Any, make: Callable[[Any], optim.Optimizer]) -> None:
        params = list(params)
        super().__init__(params, {})
        self.inner = [make(params[:2]), make(params[2:])]

    def step(self, closure: Any = None) -> None:
        for each in self.inner:
            each.step()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))


def backward(model: nn.Module, rank: int) -> None:
    model(torch.randn(4, 12, generator=torch.Generator().manual_seed(rank))).square().mean().backward()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def run_ddp(rank: int, settings: dict[str, Any], make: Callable[[Any], optim.Optimizer], said: str) -> None:
    model = net()
    early = make(model.parameters())  # before attach, as in most scripts
    ddp = DistributedDataParallel(model)
    with attach(ddp, **settings):
        for optimizer in (early, make(ddp.parameters())):
            before = weights(model)
            backward(ddp, rank)
            if said:
                with pytest.raises(CommError, match=said) as caught:
                    optimizer.step()
                assert "torch.optim.SGD" in caught.value.fix
                assert "target = 'gradient'" in caught.value.fix
                assert all(map(torch.equal, before, weights(model)))
                optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1).step()  # what was averaged is not lost
            else:
                optimizer.step()
            assert not any(map(torch.equal, before, weights(model)))


@pytest.mark.parametrize(
    ("settings", "make", "said"),
    [
        (UPDATE, partial(optim.AdamW, lr=3e-4), "the optimizer is AdamW"),
        (SMALL, partial(optim.Adam, fused=True), "the optimizer is Adam:"),  # the default target is "update"
        ({**UPDATE, "compressor": "dense"}, optim.RMSprop, "the optimizer is RMSprop"),
        ({**UPDATE, "compressor": "auto"}, optim.Adagrad, "the optimizer is Adagrad"),
        (UPDATE, partial(optim.SGD, lr=0.1, momentum=0.9), "SGD with momentum = 0.9"),
        (UPDATE, Own, "the optimizer is Own"),
        (UPDATE, partial(Several, make=optim.AdamW), "the optimizer is AdamW"),
        (UPDATE, partial(Several, make=partial(optim.SGD, lr=0.01)), ""),
        (UPDATE, partial(optim.SGD, lr=0.01, weight_decay=0.1), ""),
        (UPDATE, partial(OwnSGD, lr=0.01), ""),
        (GRADIENT, optim.AdamW, ""),
        (GRADIENT, partial(optim.SGD, lr=0.1, momentum=0.9), ""),
    ],
)
def test_under_ddp(
    two_ranks: Ranks, settings: dict[str, Any], make: Callable[[Any], optim.Optimizer], said: str
) -> None:
    two_ranks.run(run_ddp, settings, make, said)


def test_the_error_repeats_the_learning_rate() -> None:
    from outlast.comm.exchange.update_optimizer import refuse_other_than_sgd

    with pytest.raises(CommError) as caught:
        refuse_other_than_sgd(optim.AdamW(net().parameters(), lr=3e-4))
    assert "lr=0.0003" in caught.value.fix
    assert "clip_grad_norm_" in caught.value.fix


def run_elsewhere(rank: int) -> None:
    """Other parameters may have any optimizer; one of several groups is enough to be refused."""
    head, body = nn.Linear(12, 12), net()
    ddp = DistributedDataParallel(body)
    with attach(ddp, **UPDATE):
        backward(nn.Sequential(head, ddp), rank)
        optim.AdamW(head.parameters()).step()
        mixed = optim.AdamW([{"params": head.parameters()}, {"params": body.parameters(), "lr": 1e-4}])
        with pytest.raises(CommError, match="AdamW"):
            mixed.step()


def test_other_parameters(two_ranks: Ranks) -> None:
    two_ranks.run(run_elsewhere)


def run_wrapped(rank: int) -> None:
    """A wrapper is judged by what it wraps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the package, on import
        from torch.distributed.optim import ZeroRedundancyOptimizer
    ddp = DistributedDataParallel(net())
    with attach(ddp, **UPDATE):
        backward(ddp, rank)
        with pytest.raises(CommError, match="the optimizer is AdamW"):
            ZeroRedundancyOptimizer(ddp.parameters(), optim.AdamW, lr=1e-3).step()
        before = weights(ddp)
        ZeroRedundancyOptimizer(ddp.parameters(), optim.SGD, lr=1e-2).step()
        assert not all(map(torch.equal, before, weights(ddp)))


def test_wrapped(two_ranks: Ranks) -> None:
    two_ranks.run(run_wrapped)


def run_scheduled_and_accumulated(rank: int) -> None:
    """Found at the first step, whatever stands around it: a scheduler, accumulation, a closure."""
    ddp = DistributedDataParallel(net())
    optimizer = optim.AdamW(ddp.parameters())
    scheduler = optim.lr_scheduler.LinearLR(optimizer)
    with attach(ddp, **UPDATE) as reducer:
        reducer.begin_step(1)
        with ddp.no_sync():
            backward(ddp, rank)
        backward(ddp, rank)
        with pytest.raises(CommError, match="AdamW"):
            optimizer.step()
        scheduler.last_epoch = 0


def test_under_a_scheduler(two_ranks: Ranks) -> None:
    two_ranks.run(run_scheduled_and_accumulated)


def run_bare(rank: int) -> None:
    """Without DDP."""
    model = net()
    reducer = GradientReducer(model.named_parameters(), CommConfig(**UPDATE))
    backward(model, rank)
    reducer.reduce()
    with pytest.raises(CommError, match="AdamW"):
        optim.AdamW(model.parameters()).step()
    optim.SGD(model.parameters(), lr=0.1).step()
    reducer.close()


def test_without_ddp(two_ranks: Ranks) -> None:
    two_ranks.run(run_bare)


def run_sharded(rank: int) -> None:
    model = net()
    fully_shard(model)
    with attach(model, **UPDATE):
        backward(model, rank)
        with pytest.raises(CommError, match="the optimizer is AdamW"):
            optim.AdamW(model.parameters()).step()
        optim.SGD(model.parameters(), lr=0.1).step()


def test_under_fsdp2(two_ranks: Ranks) -> None:
    two_ranks.run(run_sharded)
