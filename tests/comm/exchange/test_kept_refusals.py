"""Optimizers that cannot be kept, and steps that cannot be made, are refused by name before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import optim
from torch.nn.parallel import DistributedDataParallel

from outlast.comm import attach
from outlast.comm.direction import Adam
from outlast.errors import CommError
from tests.comm.exchange.test_kept_optimizer import SMALL, equal, loss_of, net, weights
from tests.comm.ranks import Ranks


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


class Own(optim.AdamW):
    """With a step of its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Named(optim.AdamW):
    """That is called something else."""


def mixed(params: Any) -> optim.Optimizer:
    first, *rest = params
    return optim.AdamW([{"params": [first]}, {"params": rest, "betas": (0.8, 0.9)}])


def of_another_model(_: Any) -> optim.Optimizer:
    return optim.AdamW(net().parameters())


def run_refused(rank: int, make: Callable[[Any], Any], settings: dict[str, Any], said: str) -> None:
    ddp = DistributedDataParallel(net())
    optimizer = make(ddp.parameters())
    with pytest.raises((CommError), match=said) as caught:
        attach(ddp, optimizer=optimizer, **{**SMALL, **settings})
    assert caught.value.fix
    assert "_init_group" not in vars(optimizer)
    attach(ddp, **{**SMALL, "target": "gradient"}).close()  # nothing is left of it


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        (partial(optim.AdamW, amsgrad=True), {}, "amsgrad = True"),
        (partial(optim.AdamW, maximize=True), {}, "maximize = True"),
        (partial(optim.Adam, weight_decay=0.1), {}, "Adam's with weight_decay = 0.1"),
        (partial(optim.NAdam), {}, "NAdam, and only torch.optim.AdamW"),
        (partial(optim.SGD, lr=0.1), {}, "SGD, and only"),
        (Own, {}, "Own has a step"),
        (mixed, {}, "groups differ"),
        (of_another_model, {}, "none of the model's parameters"),
        (optim.AdamW, {"target": "gradient"}, "comm.target = 'gradient'"),
        (optim.AdamW, {"direction": Adam(beta2=0.5)}, "beta2 = 0.999 and eps = 1e-08, the direction beta2 = 0.5"),
        (optim.AdamW, {"ranks_per_node": 2}, "ranks_per_node = 2"),
    ],
)
def test_refused_by_name(two_ranks: Ranks, make: Callable[[Any], Any], settings: dict[str, Any], said: str) -> None:
    two_ranks.run(run_refused, make, settings, said)


def run_kept_twice(rank: int) -> None:
    one, other = (DistributedDataParallel(net()) for _ in range(2))
    optimizer = Named([*one.parameters(), *other.parameters()])
    with attach(one, optimizer=optimizer, **SMALL):
        with pytest.raises(CommError, match="another reducer has this optimizer"):
            attach(other, optimizer=optimizer, **SMALL)
        loss_of(one, rank, 1).backward()
        optimizer.step()
        loss_of(one, rank, 1).backward()
        with pytest.raises(CommError, match="the optimizer is AdamW"):  # another one still may not
            optim.AdamW(one.parameters()).step()
        optimizer.param_groups[0]["decoupled_weight_decay"] = False
        with pytest.raises(CommError, match=r"weight_decay = 0\.01"):
            optimizer.step()
        optimizer.param_groups[0]["decoupled_weight_decay"] = True
        optimizer.step()
    with attach(other, optimizer=optimizer, **SMALL):
        loss_of(other, rank, 1).backward()
        optimizer.step()


def test_one_reducer_at_a_time(two_ranks: Ranks) -> None:
    two_ranks.run(run_kept_twice)


def run_compiled(rank: int) -> None:
    """A step that is traced would apply this update again and again: an error, before anything is changed."""
    ddp = DistributedDataParallel(net())
    optimizer = optim.AdamW(ddp.parameters())
    with attach(ddp, optimizer=optimizer, **SMALL):
        loss_of(ddp, rank, 1).backward()
        before = weights(ddp)
        with pytest.raises(Exception, match=r"compile the model, not optimizer.step\(\)"):
            torch.compile(lambda: optimizer.step(), backend="eager")()
        assert equal(before, weights(ddp))
        torch.compiler.reset()
        optimizer.step()
        assert not equal(before, weights(ddp))


def test_compiled(two_ranks: Ranks) -> None:
    two_ranks.run(run_compiled)
