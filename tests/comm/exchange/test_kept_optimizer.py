"""The user's own AdamW applies averaged updates, and stays what it is to everything around it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from outlast.comm import CommConfig, GradientReducer, attach
from outlast.comm.direction import Adam
from outlast.errors import CommError, CommStateMismatch
from tests.comm.ranks import Ranks

SMALL: dict[str, Any] = {"density": 0.2, "dense_below": 10, "timeout_s": 30.0, "target": "update"}
BETAS, EPS = (0.9, 0.97), 1e-7
ADAM = {"betas": BETAS, "eps": EPS}


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)).to(dtype)


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(2 * step + rank)).to(dtype)
    return model(x).square().mean()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """As nanoGPT makes them: matrices decay, biases do not."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0, "lr": 3e-2},
    ]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def run_as_sgd(rank: int, settings: dict[str, Any], how: dict[str, Any], dtype: torch.dtype, beta1: float) -> None:
    """Bit for bit the path that there was before: SGD on the direction, with the same constants."""
    ended = []
    for kept in (True, False):
        ddp = DistributedDataParallel(net(dtype), bucket_cap_mb=0.0005)
        settings = {**SMALL, **settings}
        if kept:
            optimizer: optim.Optimizer = optim.AdamW(groups_of(ddp.module), lr=1e-2, **ADAM, **how)
            scheduler = optim.lr_scheduler.LinearLR(optimizer, total_iters=5)  # before attach
            reducer = attach(ddp, optimizer=optimizer, **settings)
        else:
            direction = Adam(beta1=beta1, beta2=BETAS[1], eps=EPS, clip_rms=1.0)
            reducer = attach(ddp, direction=direction, **settings)
            optimizer = optim.SGD(groups_of(ddp.module), lr=1e-2, **how)
            scheduler = optim.lr_scheduler.LinearLR(optimizer, total_iters=5)
        for step in range(1, 9):
            optimizer.zero_grad()
            with ddp.no_sync():
                loss_of(ddp, rank, 100 + step).backward()
            loss_of(ddp, rank, step).backward()
            optimizer.step()
            scheduler.step()
            if step == 6:
                optimizer.param_groups[0]["lr"] = 4e-3  # by hand
                optimizer.param_groups[0]["weight_decay"] = 0.3
        ended.append(weights(ddp))
        reducer.close()
    assert equal(*ended)
    assert not equal(ended[0], weights(net(dtype)))


@pytest.mark.parametrize(
    ("settings", "how", "dtype", "beta1"),
    [
        ({}, {}, torch.float32, 0.0),
        ({}, {"fused": True}, torch.float32, 0.0),
        ({"transport": "two-phase"}, {"foreach": True}, torch.float32, 0.0),
        ({"compressor": "sign"}, {}, torch.bfloat16, 0.0),
        ({"warmup_steps": 3}, {}, torch.float64, 0.0),
        ({"compressor": "dense"}, {}, torch.float32, BETAS[0]),  # where nothing is compressed beta1 is AdamW's
    ],
)
def test_it_ends_as_sgd_does(
    two_ranks: Ranks, settings: dict[str, Any], how: dict[str, Any], dtype: torch.dtype, beta1: float
) -> None:
    two_ranks.run(run_as_sgd, settings, how, dtype, beta1)


def run_dense(rank: int) -> None:
    """One rank's worth: with nothing compressed and nothing clipped it is AdamW, up to rounding."""
    ended = []
    for kept in (True, False):
        ddp = DistributedDataParallel(net())
        optimizer = optim.AdamW(groups_of(ddp.module), lr=1e-2, **ADAM)
        if kept:
            unclipped = Adam(beta1=BETAS[0], beta2=BETAS[1], eps=EPS)
            attach(ddp, optimizer=optimizer, direction=unclipped, **{**SMALL, "compressor": "dense"})
        for step in range(1, 7):
            optimizer.zero_grad()
            loss_of(ddp, 0, step).backward()  # the same on both ranks, so the mean of directions is that of the mean
            optimizer.step()
        ended.append(weights(ddp))
    for one, other in zip(*ended, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_dense_it_is_adamw(two_ranks: Ranks) -> None:
    two_ranks.run(run_dense)


def run_around(rank: int) -> None:
    """Hooks once each, closures, schedulers made later, groups that are added, parameters that are not averaged."""
    ddp, other = DistributedDataParallel(net()), nn.Linear(3, 3)
    alone = copy.deepcopy(other)
    first, *rest = ddp.parameters()
    optimizer = optim.AdamW([{"params": [first]}, {"params": [*rest, *other.parameters()]}], lr=1e-2, **ADAM)
    reference = optim.AdamW(alone.parameters(), lr=1e-2, **ADAM)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    everywhere = [
        register_optimizer_step_pre_hook(lambda of, *_: calls.append("all pre") if of is optimizer else None),
        register_optimizer_step_post_hook(lambda of, *_: calls.append("all post") if of is optimizer else None),
    ]
    with attach(ddp, optimizer=optimizer, **SMALL):
        scheduler = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=20)  # moves betas, too
        for _ in range(2):  # both take what the other module's gradient is as it is
            for module, its in ((other, optimizer), (alone, reference)):
                its.zero_grad()
                module(torch.ones(1, 3)).sum().backward()
            reference.param_groups[0].update(
                lr=optimizer.param_groups[0]["lr"], betas=optimizer.param_groups[0]["betas"]
            )
            loss_of(ddp, rank, 1).backward()
            before = weights(ddp)
            optimizer.step()
            reference.step()
            scheduler.step()
            assert not any(map(torch.equal, before, weights(ddp)))
            assert equal(weights(other), weights(alone))
        assert calls == ["all pre", "pre", "post", "all post"] * 2
        for each in everywhere:
            each.remove()

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss_of(ddp, rank, 2)
            value.backward()
            return value

        before = weights(ddp)
        assert optimizer.step(closure).item() > 0
        assert not any(map(torch.equal, before, weights(ddp)))
        late = nn.Linear(2, 2)
        optimizer.add_param_group({"params": late.parameters(), "lr": 0.5, "betas": (0.5, 0.5), "amsgrad": True})
        loss_of(ddp, rank, 3).backward()
        late(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert len(optimizer.state_dict()["state"]) == 4 + 2 + 2
        optimizer.param_groups[1]["betas"] = (0.9, 0.5)
        loss_of(ddp, rank, 3).backward()
        before = weights(ddp)
        with pytest.raises(CommError, match=r"group 1 \(0\.9, 0\.5\)"):
            optimizer.step()
        assert equal(before, weights(ddp))


def test_around_it_all_is_as_it_was(two_ranks: Ranks) -> None:
    two_ranks.run(run_around)


def run_scaled(rank: int, how: dict[str, Any]) -> None:
    """With a GradScaler it ends as without; a step that overflows changes nothing."""
    ended = []
    for scaled in (False, True):
        ddp = DistributedDataParallel(net())
        optimizer = optim.AdamW(groups_of(ddp.module), lr=1e-2, **ADAM, **how)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        with attach(ddp, optimizer=optimizer, **SMALL) as reducer:
            for step in range(1, 5):
                optimizer.zero_grad()
                reducer.begin_step(step, loss_scale=scaler.get_scale() if scaled else None)
                scaler.scale(loss_of(ddp, rank, step)).backward()
                scaler.step(optimizer)
                scaler.update()
            ended.append(weights(ddp))
            if scaled:
                moments = copy.deepcopy(optimizer.state_dict()["state"])
                optimizer.zero_grad()
                reducer.begin_step(5, loss_scale=scaler.get_scale())
                (scaler.scale(loss_of(ddp, rank, 5)) * (float("inf") if rank else 1.0)).backward()
                scaler.step(optimizer)
                scaler.update()
                assert equal(ended[-1], weights(ddp))
                after = optimizer.state_dict()["state"]
                assert all(torch.equal(after[n][slot], moments[n][slot]) for n in moments for slot in moments[n])
                assert scaler.get_scale() == 512.0
    assert equal(*ended)


@pytest.mark.parametrize("how", [{}, {"fused": True}])
def test_with_a_scaler(two_ranks: Ranks, how: dict[str, Any]) -> None:
    two_ranks.run(run_scaled, how)


def run_state(rank: int) -> None:
    """Compression is switched on in the middle, saved, loaded, and switched off; AdamW goes on with its moments."""
    model = net()
    ddp = DistributedDataParallel(model)
    optimizer = optim.AdamW(groups_of(model), lr=1e-2, **ADAM)
    for step in (1, 2):
        optimizer.zero_grad()
        loss_of(ddp, rank, step).backward()
        optimizer.step()
    plain = copy.deepcopy(optimizer.state_dict())
    reducer = attach(ddp, optimizer=optimizer, **SMALL)
    assert not optimizer.state  # the reducer's now
    shown = optimizer.state_dict()
    assert {key: sorted(value) for key, value in shown["state"].items()} == {
        key: sorted(value) for key, value in plain["state"].items()
    }
    assert shown["param_groups"] == plain["param_groups"]
    for number, state in plain["state"].items():
        assert torch.equal(shown["state"][number]["exp_avg_sq"], state["exp_avg_sq"])
        assert float(shown["state"][number]["step"]) == 2
    restart(ddp, optimizer, reducer)  # before the first gradient
    loss_of(ddp, rank, 3).backward()
    optimizer.step()
    reducer_state = copy.deepcopy(reducer.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    assert {float(state["step"]) for state in saved["state"].values()} == {3.0}
    later = go_on(ddp, rank, optimizer)
    for order in ("reducer first", "optimizer first"):
        back(model, saved, reducer_state, optimizer, reducer, order)
        model.load_state_dict(later[0])
        assert equal(later[1], go_on(ddp, rank, optimizer)[1]), order
    with pytest.raises(CommStateMismatch, match="and no exp_avg"):
        optimizer.load_state_dict({**saved, "state": {0: {"momentum_buffer": torch.zeros(12, 12)}}})
    wrong = {0: {slot: torch.zeros(3) for slot in ("step", "exp_avg", "exp_avg_sq")}}
    with pytest.raises(CommStateMismatch, match="exp_avg of parameter 0 is"):
        optimizer.load_state_dict({**saved, "state": wrong})
    coupled = copy.deepcopy(saved)
    coupled["param_groups"][0]["amsgrad"] = True
    with pytest.raises(CommError, match="amsgrad = True"):
        optimizer.load_state_dict(coupled)
    now = copy.deepcopy(optimizer.state_dict())
    reducer.close()
    assert "_init_group" not in vars(optimizer)
    assert len(optimizer.state) == 4
    after = optimizer.state_dict()
    assert all(torch.equal(after["state"][n][s], now["state"][n][s]) for n in now["state"] for s in now["state"][n])
    fresh = optim.AdamW(groups_of(model), lr=1.0, **ADAM)
    fresh.load_state_dict(now)  # what a plain AdamW takes
    for its in (optimizer, fresh):
        its.zero_grad()
        loss_of(ddp, rank, 9).backward()
        before = weights(model)
        its.step()
        assert not any(map(torch.equal, before, weights(model)))
    assert {float(state["step"]) for state in optimizer.state_dict()["state"].values()} == {6.0}


def restart(ddp: nn.Module, optimizer: optim.Optimizer, reducer: Any) -> None:
    """What is saved before the first gradient loads again, moments included."""
    state = copy.deepcopy(reducer.state_dict())
    before = copy.deepcopy(optimizer.state_dict()["state"])
    reducer.load_state_dict(state)
    after = optimizer.state_dict()["state"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n]["exp_avg_sq"], after[n]["exp_avg_sq"]) for n in before)


def go_on(
    ddp: DistributedDataParallel, rank: int, optimizer: optim.Optimizer
) -> tuple[dict[str, Tensor], list[Tensor]]:
    began = copy.deepcopy(ddp.module.state_dict())
    for step in (4, 5):
        optimizer.zero_grad()
        loss_of(ddp, rank, step).backward()
        optimizer.step()
    return began, weights(ddp)


def back(
    model: nn.Module, saved: Any, reducer_state: Any, optimizer: optim.Optimizer, reducer: Any, order: str
) -> None:
    """Another rank's moments in the optimizer's state do not replace this rank's own in the reducer's."""
    strange = copy.deepcopy(saved)
    for state in strange["state"].values():
        state["exp_avg_sq"].mul_(3)
    loads: list[Callable[[], Any]] = [
        lambda: reducer.load_state_dict(reducer_state),
        lambda: optimizer.load_state_dict(strange),
    ]
    for load in loads if order == "reducer first" else reversed(loads):
        load()


def test_state(two_ranks: Ranks) -> None:
    two_ranks.run(run_state)


def run_loaded_betas(rank: int) -> None:
    """Constants that a state dict brings count from the next gradient on, as they would in AdamW."""
    ended = []
    for betas in ((0.9, 0.5), (0.9, 0.99)):
        ddp = DistributedDataParallel(net())
        optimizer = optim.AdamW(ddp.parameters(), lr=1e-2, betas=betas)
        with attach(ddp, optimizer=optimizer, **SMALL):
            other = optim.AdamW(net().parameters(), lr=1e-2, betas=(0.9, 0.5))
            optimizer.load_state_dict(other.state_dict())
            for step in (1, 2, 3):
                optimizer.zero_grad()
                loss_of(ddp, rank, step).backward()
                optimizer.step()
            ended.append(weights(ddp))
    assert equal(*ended)


def test_constants_of_a_state_dict_count(two_ranks: Ranks) -> None:
    two_ranks.run(run_loaded_betas)


def run_bare(rank: int) -> None:
    """Without DDP."""
    model = net()
    optimizer = optim.Adam(model.parameters(), lr=1e-2)
    with GradientReducer(model.named_parameters(), CommConfig(**SMALL), optimizer=optimizer) as reducer:
        for step in (1, 2):
            optimizer.zero_grad()
            loss_of(model, rank, step).backward()
            reducer.reduce()
            optimizer.step()
    assert len(optimizer.state) == 4


def test_without_ddp(two_ranks: Ranks) -> None:
    two_ranks.run(run_bare)


def run_elsewhere(rank: int) -> None:
    """Copies are AdamW with the moments; what no rank uses stays; after a failure the optimizer is given back."""
    model = net()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, **ADAM)
    reducer = attach(ddp, optimizer=optimizer, **SMALL)
    ddp.module.forward = lambda x: model[0](x)  # the last layer is not used
    last = weights(model[2])
    loss_of(ddp, rank, 1).backward()
    optimizer.step()
    assert equal(last, weights(model[2]))
    assert sorted(optimizer.state_dict()["state"]) == [0, 1]
    shown = optimizer.state_dict()["state"]
    copied = copy.deepcopy(optimizer)
    assert type(copied) is optim.AdamW
    assert not {"_init_group", "__getstate__"} & vars(copied).keys()
    assert not optimizer.state
    for number, param in enumerate(copied.param_groups[0]["params"][:2]):
        assert torch.equal(copied.state[param]["exp_avg_sq"], shown[number]["exp_avg_sq"])
        assert copied.state[param]["exp_avg_sq"].data_ptr() != shown[number]["exp_avg_sq"].data_ptr()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optim.AdamW(net().parameters()).load_state_dict(torch.load(file, weights_only=True))
    with pytest.raises(CommError):
        (ddp(torch.ones(1, 12)).sum() * float("nan")).backward()
    with pytest.raises(CommError):
        optimizer.state_dict()
    reducer.close()
    assert not {"_init_group", "__getstate__"} & vars(optimizer).keys()
    assert len(optimizer.state) == 2


def test_elsewhere(two_ranks: Ranks) -> None:
    two_ranks.run(run_elsewhere)


def run_in_another_format(rank: int) -> None:
    """Moments have the parameter's memory format, which torch's fused kernels take for granted."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    ddp = DistributedDataParallel(model)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, fused=True)

    def gradient(of: nn.Module) -> None:
        of.zero_grad()
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(rank)).to(memory_format=torch.channels_last)
        of(x).square().mean().backward()

    gradient(ddp)
    optimizer.step()
    with attach(ddp, optimizer=optimizer, **SMALL):
        gradient(ddp)
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
    ended = []
    for fused in (True, False):
        again = copy.deepcopy(model)
        its = optim.AdamW(again.parameters(), lr=1e-2, fused=fused)
        its.load_state_dict({**copy.deepcopy(saved), "param_groups": its.state_dict()["param_groups"]})
        gradient(again)
        its.step()
        ended.append(weights(again))
    gradient(model)
    optimizer.step()
    for one, other, own in zip(*ended, weights(model), strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one, own)


def test_memory_formats(two_ranks: Ranks) -> None:
    two_ranks.run(run_in_another_format)


def run_auto(rank: int) -> None:
    """Dense at first, with AdamW's own beta1; then whatever is chosen, and a restart begins with that."""
    state: dict[str, Any] = {}
    for again in (False, True):
        ddp = DistributedDataParallel(net())
        optimizer = optim.AdamW(ddp.parameters(), lr=1e-2)
        with attach(ddp, optimizer=optimizer, target="update", compressor="auto", dense_below=10) as reducer:
            assert isinstance(reducer, GradientReducer)
            if again:
                reducer.load_state_dict(state)
                assert {float(one["step"]) for one in optimizer.state_dict()["state"].values()} == {30.0}
            for step in range(31 if again else 1, 33 if again else 31):
                optimizer.zero_grad()
                loss_of(ddp, rank, step).backward()
                optimizer.step()
            assert again or reducer.choice is not None
            state = copy.deepcopy(reducer.state_dict())
        assert {float(one["step"]) for one in optimizer.state_dict()["state"].values()} == {32.0 if again else 30.0}


def test_auto(two_ranks: Ranks) -> None:
    two_ranks.run(run_auto)
