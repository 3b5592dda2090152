"""Watched optimizers and modules: the update waits without being told, and a save need not wait for the update."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from outlast.checkpoint import Checkpointer
from outlast.errors import SnapshotMutated
from outlast.events import CheckpointSaved, Event
from tests.checkpoint.helpers import checkpointer, of


def training() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    return net, torch.optim.AdamW(net.parameters(), lr=0.1)


def forward_backward(net: nn.Module) -> None:
    net(torch.ones(3, 8)).square().sum().backward()


def save(saver: Checkpointer, net: nn.Module) -> dict[str, torch.Tensor]:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    saver.save(1, replicated={"model": net.state_dict()}, local={})
    return before


def test_the_update_waits_for_the_copy(tmp_path: Path, gate: threading.Event) -> None:
    net, optimizer = training()
    with checkpointer(tmp_path) as saver:
        saver.watch(net, optimizer)
        before = save(saver, net)
        forward_backward(net)
        assert saver._saving is not None
        assert not saver._saving.confirmed
        threading.Timer(0.05, gate.set).start()
        optimizer.step()
        assert saver._saving.confirmed
        assert not torch.equal(net.state_dict()["0.weight"], before["0.weight"])
        back = saver.restore("auto")
    assert back is not None
    assert all(torch.equal(back.replicated["model"][name], tensor) for name, tensor in before.items())
    hooks = [parameter._post_accumulate_grad_hooks for parameter in net.parameters()]
    assert not any(hooks)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("named", [True, False])
def test_a_closure_does_not_wait(tmp_path: Path, gate: threading.Event, named: bool) -> None:
    """Forward and backward are in it: the copy goes on beside them."""
    net, optimizer = training()
    with checkpointer(tmp_path) as saver:
        saver.watch(net, optimizer)
        before = save(saver, net)

        def closure() -> float:
            assert saver._saving is not None
            assert not saver._saving.confirmed
            forward_backward(net)
            threading.Timer(0.05, gate.set).start()
            return 3.0

        assert (optimizer.step(closure=closure) if named else optimizer.step(closure)) == 3.0
        assert saver._saving is not None
        assert saver._saving.confirmed
        back = saver.restore("auto")
    assert back is not None
    assert all(torch.equal(back.replicated["model"][name], tensor) for name, tensor in before.items())


class Perturbed(torch.optim.SGD):
    """Changes parameters before it calls its closure, as sharpness-aware minimization does."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                param.add_(0.1)
        return super().step(closure)


def test_an_optimizer_that_changes_before_its_closure_waits_before(tmp_path: Path, gate: threading.Event) -> None:
    net, _ = training()
    with checkpointer(tmp_path) as saver:
        optimizer = Perturbed(net.parameters(), lr=0.1)
        saver.watch(net, optimizer)
        before = save(saver, net)
        threading.Timer(0.05, gate.set).start()
        optimizer.step(lambda: forward_backward(net))
        back = saver.restore("auto")
    assert back is not None
    assert all(torch.equal(back.replicated["model"][name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("watched", [True, False])
def test_backward_is_enough_for_a_commit(tmp_path: Path, watched: bool) -> None:
    net, _ = training()
    events: list[Event] = []
    with checkpointer(tmp_path, events) as saver:
        if watched:
            saver.watch(net)
        save(saver, net)
        assert saver._saving is not None
        saver._saving.copied.wait()
        assert not saver._saving.confirmed
        forward_backward(net)
        assert saver._saving.confirmed is watched
        if watched:
            saver._saving.join()
            assert [event.step for event in of(CheckpointSaved, events)] == [1], "no update was needed"
        saver.wait_copied()


def test_a_change_is_found_all_the_same(tmp_path: Path) -> None:
    net, _ = training()
    events: list[Event] = []
    with checkpointer(tmp_path, events) as saver:
        saver.watch(net)
        save(saver, net)
        assert saver._saving is not None
        saver._saving.copied.wait()
        with torch.no_grad():
            next(net.parameters()).add_(1)
        forward_backward(net)
        with pytest.raises(SnapshotMutated, match=r"0\.weight"):
            saver.wait_copied()
    assert not of(CheckpointSaved, events)


def test_frozen_parameters_and_accumulation(tmp_path: Path) -> None:
    net, optimizer = training()
    next(net.parameters()).requires_grad_(False)
    with checkpointer(tmp_path) as saver:
        saver.watch(net, optimizer)
        for step in range(1, 6):
            for _ in range(3):
                forward_backward(net)
            optimizer.step()
            saver.save(step, replicated={"model": net.state_dict()}, local={}, durable=True)
        back = saver.restore("auto")
    assert back is not None
    assert back.step == 5
    assert torch.equal(back.replicated["model"]["1.weight"], net.state_dict()["1.weight"])
