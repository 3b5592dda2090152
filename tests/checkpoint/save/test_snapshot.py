"""Lazy copies: training may go on until wait_copied(), what it may not do is found, and the memory is used again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from outlast.checkpoint import Checkpointer
from outlast.errors import CheckpointError, SnapshotMutated
from outlast.events import CheckpointSaved, Event
from tests.checkpoint.damage import steps_at
from tests.checkpoint.helpers import checkpointer, failed, of
from tests.checkpoint.states import same


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))


def changed_in_place(net: torch.nn.Module) -> None:
    with torch.no_grad():
        net.get_parameter("1.weight").mul_(2)


def changed_behind_autograd(net: torch.nn.Module) -> None:
    net.get_parameter("1.weight").data += 1


def changed_through_numpy(net: torch.nn.Module) -> None:
    net.get_parameter("1.weight").detach().numpy()[:] = 3


def changed_by_fused_adamw(net: torch.nn.Module) -> None:
    weight = net.get_parameter("1.weight")
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=1e-3, fused=True).step()


CHANGES: list[Callable[[torch.nn.Module], None]] = [
    changed_in_place,
    changed_behind_autograd,
    changed_through_numpy,
    changed_by_fused_adamw,
]


def is_refused(saver: Checkpointer, events: list[Event], url: Path) -> None:
    with pytest.raises(SnapshotMutated, match=r"model/1\.weight"):
        saver.wait_copied()
    net = model()
    saver.save(2, replicated={"model": net.state_dict()}, local={})
    saver.close()
    assert len(failed(events)) == 1
    assert "model/1.weight" in failed(events)[0]
    assert [event.step for event in of(CheckpointSaved, events)] == [2]
    assert [name for name in steps_at(url) if "failed" not in name] == ["step_00000002"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_before_the_copy(tmp_path: Path, gate: threading.Event, change: Callable[..., None]) -> None:
    net, events = model(), list[Event]()
    saver = checkpointer(tmp_path, events)
    saver.save(1, replicated={"model": net.state_dict()}, local={})
    change(net)
    gate.set()
    is_refused(saver, events, tmp_path)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_copy_but_before_the_wait(tmp_path: Path, change: Callable[..., None]) -> None:
    net, events = model(), list[Event]()
    saver = checkpointer(tmp_path, events)
    saver.save(1, replicated={"model": net.state_dict()}, local={})
    assert saver._saving is not None
    assert saver._saving.copied.wait(60)
    change(net)
    is_refused(saver, events, tmp_path)


NEXT: dict[str, Callable[[Checkpointer], object]] = {
    "save": lambda saver: saver.save(2, replicated={}, local={}),
    "restore": lambda saver: saver.restore("auto"),
    "close": Checkpointer.close,
}


@pytest.mark.parametrize("call", NEXT)
def test_a_forgotten_wait_is_found_by_the_next_call(tmp_path: Path, call: str) -> None:
    net = model()
    saver = checkpointer(tmp_path)
    saver.save(1, replicated={"model": net.state_dict()}, local={})
    changed_in_place(net)
    with pytest.raises(SnapshotMutated):
        NEXT[call](saver)
    saver.close()


def test_changes_after_the_wait_do_not_reach_the_checkpoint(tmp_path: Path, gate: threading.Event) -> None:
    net, rng = model(), torch.arange(4)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    values = {"seen": [1]}
    with checkpointer(tmp_path) as saver:
        saver.save(1, replicated={"model": net.state_dict(), "v": values}, local={"rng": {"s": rng}}, eager={"rng"})
        rng.zero_()  # eager: copied before save() returned, though no lazy copy has begun
        values["seen"].append(2)
        net(torch.ones(8)).sum().backward()  # forward and backward leave what is saved alone
        gate.set()
        saver.wait_copied()
        changed_in_place(net)
        back = saver.restore("auto")
    assert back is not None
    assert same(back.replicated, {"model": before, "v": {"seen": [1]}})
    assert same(back.local, {"rng": {"s": torch.arange(4)}})


def test_save_returns_before_the_copy_and_the_wait_is_counted(tmp_path: Path, gate: threading.Event) -> None:
    events: list[Event] = []
    with checkpointer(tmp_path, events) as saver:
        assert saver.wait_copied() == 0.0
        saver.save(1, replicated={"model": model().state_dict()}, local={})
        assert saver._saving is not None
        assert not saver._saving.copied.is_set()
        threading.Timer(0.2, gate.set).start()
        waited_s = saver.wait_copied()
        assert waited_s >= 0.1
        assert saver.wait_copied() < waited_s
    (saved,) = of(CheckpointSaved, events)
    assert saved.committed
    assert saved.durable_s >= saved.blocked_s >= waited_s - 0.05


def test_tensors_made_in_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        odd = torch.ones(3)
    with checkpointer(tmp_path) as saver:
        with pytest.raises(CheckpointError, match="'ema/w'"):
            saver.save(1, replicated={"ema": {"w": odd}}, local={})
        saver.save(2, replicated={"ema": {"w": odd}}, local={}, eager={"ema"})


def test_host_memory_is_used_again(tmp_path: Path) -> None:
    net = model()
    places = set()
    with checkpointer(tmp_path) as saver:
        for step in (1, 2, 3):
            saver.save(step, replicated={"model": net.state_dict()}, local={"rng": {"s": torch.ones(step)}})
            saver.wait_copied()
            places.add(saver._arena._pages.data_ptr())
    assert len(places) == 1
