"""A step is what an optimizer's step ends: loops with several backwards a step are right, or told what to wrap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from outlast.comm import CommConfig, GradientReducer, Reducer, attach
from outlast.errors import CommError
from tests.comm.ranks import Ranks
from tests.comm.toy import Toy, backward, gradients, wrap

METHODS = [
    {"feedback": "ef21", "target": "gradient"},
    {"feedback": "econtrol", "target": "gradient"},
    {"feedback": "ef14", "target": "update"},
]


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def told(caught: pytest.ExceptionInfo[CommError]) -> None:
    assert "no optimizer has made a step" in caught.value.what
    assert "no_sync()" in caught.value.fix
    assert "begin_step()" in caught.value.fix


def run_gan(rank: int, settings: dict[str, Any]) -> None:
    """The tutorials' loop: two backwards of the discriminator, a step; one of the generator through it, a step."""
    d, g = (nn.Linear(20, 20) for _ in range(2))
    models = [DistributedDataParallel(model) for model in (d, g)]
    reducers = [attach(model, CommConfig(**settings, density=0.2, dense_below=10)) for model in models]
    ddp_d, ddp_g = models
    of_d, of_g = sgd(d), sgd(g)
    x = torch.randn(4, 20, generator=torch.Generator().manual_seed(rank))
    ddp_d(x).square().mean().backward()
    with pytest.raises(CommError) as caught:  # in the first iteration: no optimizer was ever stepped
        ddp_d(ddp_g(x).detach()).square().mean().backward()
    told(caught)
    # The error came before anything was exchanged: with the fix, the loop goes on.
    for step in range(3):
        of_d.zero_grad()
        with ddp_d.no_sync():
            ddp_d(x).square().mean().backward()
        if step:
            ddp_d(ddp_g(x).detach()).square().mean().backward()
            of_d.step()
        else:
            of_d.step()  # of what was averaged before the error
        of_g.zero_grad()
        with ddp_d.no_sync():  # the generator's loss only passes through
            ddp_d(ddp_g(x)).square().mean().backward()
        of_g.step()
    of_d.zero_grad()
    ddp_d(ddp_g(x)).square().mean().backward()  # thrown away by the next zero_grad()
    of_g.step()
    of_d.zero_grad()
    with pytest.raises(CommError) as caught:
        ddp_d(x).square().mean().backward()
    told(caught)
    for reducer in reducers:
        reducer.close()


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: s["feedback"])
def test_a_gan_is_told_what_to_wrap(three_ranks: Ranks, settings: dict[str, Any]) -> None:
    three_ranks.run(run_gan, settings)


def estimate_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(ddp: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss: Tensor = ddp(x).square().mean()
    loss.backward()
    return loss


def run_twice(rank: int, kind: str) -> None:
    """With density 1 and no rounding an estimate is the mean, so what a loop is given can be compared with DDP's."""
    x, y = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(rank)).unbind()
    found = []
    for compressed in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6))
        ddp = DistributedDataParallel(model, find_unused_parameters=kind == "two optimizers")
        reducer: Reducer | None = None
        if compressed:
            config = CommConfig(
                feedback="ef21", target="gradient", density=1.0, values="fp32", dense_below=1, probe_every_steps=0
            )
            reducer = attach(ddp, config)
        optimizers = [torch.optim.SGD(model[place].parameters(), lr=0.01) for place in (0, 2)]
        seen = []
        for _ in range(4):
            for optimizer in optimizers:
                optimizer.zero_grad()
            if kind == "penalty":
                inputs = x.clone().requires_grad_()
                out = ddp(inputs).square().mean()
                (slope,) = torch.autograd.grad(out, inputs, create_graph=True)
                (out + slope.square().sum()).backward()
            elif kind == "used twice":
                (ddp(x).square().mean() + ddp(y).square().mean()).backward()
            elif kind == "closure":
                closing = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
                closing.step(partial(loss_of, ddp, closing, x))
            else:
                ddp(x).square().mean().backward()
            seen.append(estimate_of(model))
            for optimizer in optimizers:
                optimizer.step()
        found.append(seen)
        if reducer is not None:
            reducer.close()
    for ours, theirs in zip(*found, strict=True):
        for name, mean in theirs.items():
            torch.testing.assert_close(ours[name], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["penalty", "used twice", "two optimizers", "closure"])
def test_other_loops_get_the_mean(three_ranks: Ranks, kind: str) -> None:
    three_ranks.run(run_twice, kind)


def run_alternating(rank: int) -> None:
    """One model, two losses, two optimizers: each backward uses one half, and each is a step of that half."""
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.halves = model

        def forward(self, which: str, x: Tensor) -> Tensor:
            out: Tensor = self.halves[which](x)
            return out

    ddp = DistributedDataParallel(Halves(), find_unused_parameters=True)
    reducer = attach(ddp, CommConfig(feedback="ef14", target="gradient", density=0.3, dense_below=1))
    optimizers = {name: sgd(half) for name, half in model.items()}
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))
    for _ in range(3):
        for name, optimizer in optimizers.items():
            optimizer.zero_grad()
            ddp(name, x).square().mean().backward()
            optimizer.step()
    # Both optimizers' gradients are alive, and only one of them steps.
    for _ in range(2):
        ddp("a", x).square().mean().backward()
        optimizers["b"].step()
        if _ == 0:
            with pytest.raises(CommError, match=r"halves\.a\.weight"):
                ddp("a", x).square().mean().backward()
            break
    reducer.close()


def test_two_optimizers_take_turns(three_ranks: Ranks) -> None:
    three_ranks.run(run_alternating)


def run_own_update(rank: int, feedback: str) -> None:
    """Where no optimizer of torch's has the parameters, every average is a step, as before."""
    ddp, reducer = wrap({"feedback": feedback})
    for step in (1, 2, 3):
        backward(ddp, gradients(step, rank))
        with torch.no_grad():
            for p in ddp.parameters():
                assert p.grad is not None
                p -= 0.1 * p.grad
    reducer.close()


def test_an_update_of_ones_own(three_ranks: Ranks) -> None:
    three_ranks.run(run_own_update, "ef21")


def run_failing(rank: int, kind: str) -> None:
    """A step that raised has used no average: the next, without a step in between, is named, and nothing is sent."""
    model = nn.Linear(8, 8, bias=False)
    ddp = DistributedDataParallel(model)
    reducer = attach(ddp, CommConfig(feedback="ef21", target="gradient", density=0.3, dense_below=1))
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))
    fails = [True]

    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if fails and kind == "step":
                raise MemoryError("of the optimizer")
            return super().step(closure)

    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3) if kind == "lbfgs" else Failing(model.parameters())
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        loss = loss_of(ddp, optimizer, x)
        if kind == "twice":
            with pytest.raises(CommError) as caught:  # in one call of a closure, too
                loss_of(ddp, optimizer, x)
            told(caught)
        if fails and len(calls) == (2 if kind == "lbfgs" else 1) and kind != "twice":
            raise MemoryError("of the closure")
        return loss

    if kind == "twice":
        optimizer.step(closure)
        fails.clear()
    else:
        if kind == "step":
            loss_of(ddp, optimizer, x)
        with pytest.raises(MemoryError):
            optimizer.step(closure)
        fails.clear()
        with pytest.raises(CommError) as caught:
            loss_of(ddp, optimizer, x)
        told(caught)
        with pytest.raises(CommError) as caught:
            optimizer.step(closure)
        told(caught)
    if kind != "lbfgs":
        optimizer.step()  # of what was averaged before
        kind = "works"
        for _ in range(2):
            optimizer.step(closure)
    reducer.close()


@pytest.mark.parametrize("kind", ["step", "closure", "lbfgs", "twice"])
def test_a_step_that_raised_has_used_nothing(three_ranks: Ranks, kind: str) -> None:
    three_ranks.run(run_failing, kind)


def run_named_or_dense(rank: int) -> None:
    """Who names steps answers for them; and a mean that keeps nothing may be taken as often as one likes."""
    ddp, reducer = wrap({"feedback": "ef21"})
    optimizer = sgd(ddp)
    for step in (1, 2, 3):
        reducer.begin_step(step)
        backward(ddp, gradients(step, rank))  # and the update is skipped
    del optimizer
    reducer.close()
    ddp, reducer = wrap({"compressor": "dense"})
    optimizer = sgd(ddp)
    ddp.zero_grad()
    for micro in (0, 1):
        ddp(gradients(1, rank, micro)).backward()
    mean = sum(g for r in range(3) for m in (0, 1) for g in [gradients(1, r, m)["mid"]]) / 3
    torch.testing.assert_close(ddp.module.mid.grad, mean)
    del optimizer
    reducer.close()


def test_named_steps_and_dense_means(three_ranks: Ranks) -> None:
    three_ranks.run(run_named_or_dense)


def run_without_ddp(rank: int, again: Callable[[nn.Module, GradientReducer], None]) -> None:
    model = Toy()
    reducer = GradientReducer(model.named_parameters(), CommConfig(feedback="ef21", target="gradient"))
    optimizer = sgd(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(gradients(1, rank)).backward()
        reducer.reduce()
        optimizer.step()
    optimizer.zero_grad()
    again(model, reducer)
    reducer.close()


def reduce_twice(model: nn.Module, reducer: GradientReducer) -> None:
    reducer.reduce()
    with pytest.raises(CommError, match="no optimizer has made a step"):
        reducer.reduce()


def test_without_ddp_too(three_ranks: Ranks) -> None:
    three_ranks.run(run_without_ddp, reduce_twice)


def run_fsdp(rank: int) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    for part in model:
        fully_shard(part)
    fully_shard(model)
    reducer = attach(model, CommConfig(feedback="ef21", target="gradient", density=0.2, dense_below=10))
    optimizer = sgd(model)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(rank))
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model(x).square().mean().backward()
    with pytest.raises(CommError, match="no optimizer has made a step") as caught:
        model(x).square().mean().backward()
    assert "set_requires_gradient_sync(False)" in caught.value.fix
    reducer.close()


def test_fsdp_too(three_ranks: Ranks) -> None:
    three_ranks.run(run_fsdp)


def run_scaler(rank: int, begins: bool, feedback: str) -> None:
    ddp, reducer = wrap({"feedback": feedback})
    optimizer, scaler = sgd(ddp), torch.amp.GradScaler("cpu", init_scale=256.0)
    before = ddp.module.mid.detach().clone()
    if begins:
        reducer.begin_step(1)
    ddp.zero_grad()
    scaler.scale(ddp(gradients(1, rank))).backward()
    with pytest.raises(CommError, match="GradScaler steps the optimizer, with a scale of 256") as caught:
        scaler.step(optimizer)
    assert "loss_scale=scaler.get_scale()" in caught.value.fix
    assert torch.equal(ddp.module.mid, before)
    reducer.close()


@pytest.mark.parametrize("begins", [False, True])
def test_a_scaler_that_was_not_told_is_named(three_ranks: Ranks, begins: bool) -> None:
    three_ranks.run(run_scaler, begins, "ef14")


def run_scaler_overflow(rank: int) -> None:
    ddp, reducer = wrap({"feedback": "ef14"})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    loss = scaler.scale(ddp(gradients(1, rank)))
    with pytest.raises(CommError, match=r"GradScaler multiplies losses by 1\.70141e\+38") as caught:
        loss.backward()
    assert "loss_scale=scaler.get_scale()" in caught.value.fix
    assert "learning rate" not in str(caught.value)
    reducer.close()
    # One that is switched off, or that is told, is none of this.
    ddp, reducer = wrap({"feedback": "ef14"})
    optimizer = sgd(ddp)
    for step, enabled in ((1, False), (2, True)):
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=enabled)
        reducer.begin_step(step, loss_scale=scaler.get_scale() if enabled else None)
        ddp.zero_grad()
        scaler.scale(ddp(gradients(step, rank))).backward()
        scaler.step(optimizer)
        scaler.update()
    reducer.close()


def test_an_overflow_names_the_scaler(three_ranks: Ranks) -> None:
    three_ranks.run(run_scaler_overflow)
