"""Lazy copies: training goes on until wait_copied(), early changes are detected, and memory is reused."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import crc32c
import pytest
import torch

from outlast.checkpoint import Checkpointer
from outlast.checkpoint.save.plan import plan_rank
from outlast.checkpoint.save.snapshot import Snapshot
from outlast.checkpoint.state.tree import StateTree, lay_out
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


@pytest.mark.parametrize("verify", [False, True])
def test_packs_of_small_tensors_of_any_layout_hold_their_bytes_and_checksum(verify: bool) -> None:
    """Small tensors take a shorter way; those that are views, conjugated or without elements take PyTorch's."""
    tensors = {
        "plain": torch.arange(5.0),
        "view": torch.arange(12.0).reshape(3, 4).T,
        "every other": torch.arange(9)[::2],
        "conjugate": torch.tensor([1 + 2j, 3j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(True),
        "odd": torch.arange(7, dtype=torch.uint8),
        "large": torch.arange(30_000.0),
        "expanded": torch.ones(1).expand(6),
    }
    tree = StateTree()
    lay_out(tree, {"m": tensors}, "", ())
    plan = plan_rank(tree, StateTree(), 0, 1, chunk_bytes=1 << 20, pack_below_bytes=1 << 20)
    (part,) = plan.parts
    target = torch.full((part.nbytes + 4096,), 255, dtype=torch.uint8)
    crc = Snapshot(plan.parts).copy(0, target, verify=verify)
    payload = target[: part.nbytes]
    assert crc == crc32c.crc32c(payload.numpy().data)
    assert bytes(target[part.nbytes :].numpy()) == crc.to_bytes(4, "little") + bytes(4092)
    covered = torch.zeros(part.nbytes, dtype=torch.bool)
    for content in part.contents:
        at = slice(content.offset, content.offset + content.source.numel() * content.source.itemsize)
        want = (
            tensors[content.item.path.split("/")[1]]
            .resolve_conj()
            .resolve_neg()
            .clone(memory_format=torch.contiguous_format)
            .reshape(-1)
        )
        assert torch.equal(payload[at], want.view(torch.uint8))
        covered[at] = True
    assert not payload[~covered].any()


def test_the_collector_is_as_it_was_after_a_save(tmp_path: Path) -> None:
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            with checkpointer(tmp_path / str(enabled)) as saver:
                saver.save(1, replicated={"m": {"w": torch.ones(2)}})
                assert gc.isenabled() == enabled
                with pytest.raises(CheckpointError):
                    saver.save(2, replicated={"m": {"w": object()}})
                assert gc.isenabled() == enabled
        finally:
            gc.enable()
