"""What real loops do between saves: every optimizer's way to update, averaged weights, schedulers, gradients zeroed."""

from __future__ import annotations

import copy
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from outlast.errors import SnapshotMutated
from tests.checkpoint.helpers import checkpointer
from tests.checkpoint.states import same

OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "sgd, one by one": partial(optim.SGD, lr=0.1, momentum=0.9, foreach=False),
    "sgd, foreach": partial(optim.SGD, lr=0.1, momentum=0.9, foreach=True),
    "sgd, fused": partial(optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "adam, foreach": partial(optim.Adam, lr=0.1, amsgrad=True, foreach=True),
    "adamw, fused": partial(optim.AdamW, lr=0.1, fused=True),
    "adamw, its rate a tensor": lambda parameters: optim.AdamW(parameters, lr=torch.tensor(0.1), foreach=False),
    "adagrad": partial(optim.Adagrad, lr=0.1),
    "rmsprop, foreach": partial(optim.RMSprop, lr=0.1, centered=True, foreach=True),
    "lbfgs, which calls the loop back": partial(optim.LBFGS, lr=0.5, max_iter=3),
}


class Loop:
    def __init__(self, make: Callable[..., optim.Optimizer]) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.ema = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.optimizer = make(self.net.parameters())
        self.scheduler = optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=10)

    def loss(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=False)  # in place
        loss: torch.Tensor = self.net(torch.randn(5, 6)).square().mean()
        loss.backward()
        return loss

    def step(self) -> None:
        if isinstance(self.optimizer, optim.LBFGS):
            self.optimizer.step(self.loss)
        else:
            self.loss()
            self.optimizer.step()
        self.ema.update_parameters(self.net)
        self.scheduler.step()

    def state(self) -> dict[str, Any]:
        scheduler = {key: value for key, value in self.scheduler.state_dict().items() if key != "_last_lr"}
        parameters = dict(self.net.named_parameters())
        moments = {
            name: dict(self.optimizer.state[parameters[name]])
            for name in parameters
            if not isinstance(self.optimizer, optim.LBFGS)
        }
        return {
            "model": {name: parameter.detach() for name, parameter in parameters.items()},
            "statistics": dict(self.net.named_buffers()),
            "ema": dict(self.ema.state_dict()),
            "optimizer": moments,
            "scheduler": scheduler if not torch.is_tensor(scheduler["base_lrs"][0]) else {},
            "gradients": {name: p.grad for name, p in parameters.items() if p.grad is not None},
        }


EAGER = {"statistics", "gradients"}
"""Forward and backward change these."""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_step_is_saved_as_it_was(tmp_path: Path, name: str) -> None:
    loop, were = Loop(OPTIMIZERS[name]), {}
    with checkpointer(tmp_path) as saver:
        saver.watch(loop.net, loop.optimizer)
        for step in range(1, 7):
            loop.step()
            were[step] = copy.deepcopy(loop.state())
            saver.save(step, replicated=loop.state(), local={}, eager=EAGER)
        saver.wait_copied()
        for step in sorted(were, reverse=True):  # going back sets newer ones aside
            back = saver.restore(step)
            assert back is not None
            assert same(back.replicated, were[step]), step


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda loop: loop.ema.update_parameters(loop.net), "ema/module"),
        (lambda loop: optim.Adam(loop.net.parameters(), foreach=True).step(), "model/0"),
        (lambda loop: optim.SGD(loop.net.parameters(), lr=1.0, foreach=False).step(), "model/0"),
        (lambda loop: loop.optimizer.step(), "model/0"),
        (lambda loop: loop.optimizer.zero_grad(set_to_none=False), "gradients/0"),
        (lambda loop: loop.net(torch.randn(5, 6)), "statistics/1"),
        (lambda loop: torch._foreach_mul_([s["exp_avg"] for s in loop.optimizer.state.values()], 0.5), "optimizer/0"),
    ],
)
def test_what_comes_too_early_is_named(
    tmp_path: Path, gate: threading.Event, change: Callable[[Loop], object], named: str
) -> None:
    loop = Loop(OPTIMIZERS["adamw, fused"])
    loop.step()
    loop.step()
    with checkpointer(tmp_path) as saver:
        saver.save(1, replicated=loop.state(), local={})
        change(loop)
        gate.set()
        with pytest.raises(SnapshotMutated, match=f"'{named}"):
            saver.wait_copied()


def test_the_loop_in_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs" / "checkpointing.md").read_text()
    code = page.split("```python\n")[1].split("```")[0].replace("1001", "last")
    assert "attach" in code
    monkeypatch.chdir(tmp_path)

    def run(last: int) -> tuple[nn.Module, Any]:
        torch.manual_seed(last)  # what the model begins with is overwritten by a restore
        model = nn.Linear(4, 1)
        names: dict[str, Any] = {
            "model": model,
            "ddp": model,  # of one rank
            "optimizer": optim.SGD(model.parameters(), lr=0.1),
            "loss": lambda model, step: model(torch.full((2, 4), 1.0 / step)).square().mean(),
            "last": last,
        }
        exec(code, names)
        return model, names["restored"]

    whole, _ = run(41)
    shutil.rmtree("runs")
    run(21)
    torch.manual_seed(41)
    again, restored = run(41)
    assert restored.step == 20
    assert not torch.equal(whole.weight, again.weight), "the first part began with other weights"
    third, restored = run(41)
    assert restored.step == 40
    assert torch.equal(third.weight, again.weight)
