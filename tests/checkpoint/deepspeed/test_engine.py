"""DeepSpeed's engines, ZeRO 0 to 3 over gloo, saved and loaded by outlast."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from outlast.checkpoint import (
    CheckpointConfig,
)
from outlast.checkpoint.deepspeed import attach
from outlast.checkpoint.deepspeed.containers import put_together, take_apart
from outlast.checkpoint.deepspeed.files import kinds_of_deepspeed
from outlast.checkpoint.save.snapshot import Snapshot
from outlast.checkpoint.storage.local import LocalStore
from outlast.checkpoint.tools import list_steps, verify
from outlast.errors import CheckpointError, CheckpointNotFound, MissingDependency, NotDurable, SnapshotMutated
from outlast.events import CheckpointRejected, CheckpointSaved, Event
from tests.comm.deepspeed.test_deepspeed import engine_of, load
from tests.comm.ranks import Ranks

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install 'outlast[deepspeed]'"
)
CONFIG = CheckpointConfig(commit_timeout_s=60.0, keep_last=0, io_threads=2, pack_below_kb=0)
KINDS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2, "gradient_accumulation_steps": 2},
    "zero3": {"stage": 3},
    "zero1-bf16-fp32": {"stage": 1, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "zero2-bf16": {"stage": 2, "bf16": {"enabled": True}},
}


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    ranks.run(load)
    yield ranks
    ranks.close()


class Net(nn.Module):
    """Parameters, one of them frozen, and a buffer that every forward changes."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 64), nn.Linear(64, 1)
        self.register_buffer("mean", torch.zeros(64))
        self.frozen = nn.Parameter(torch.full((3,), 0.5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        self.mean.mul_(0.9).add_(0.01)  # alike on all ranks: without ZeRO 3 DeepSpeed saves rank 0's alone
        return (self.last(torch.relu(hidden - self.mean.to(x.dtype))) * self.frozen.sum()).float().square().mean()


def made(kind: str) -> Any:
    torch.manual_seed(3)
    model = Net()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return engine_of(model, torch.optim.AdamW(trained, lr=1e-2), **KINDS[kind])


def forward_backward(engine: Any, rank: int, micro: int) -> Any:
    generator = torch.Generator().manual_seed(1000 * engine.global_steps + 10 * micro + rank)
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    loss = engine(torch.randn(8, 16, generator=generator).to(dtype))
    engine.backward(loss)
    return loss.item()


def train(engine: Any, rank: int, steps: int) -> list[Any]:
    losses = []
    for _ in range(steps):
        for micro in range(engine.gradient_accumulation_steps()):
            losses.append(forward_backward(engine, rank, micro))
            engine.step()
    return losses


def tensors(value: Any, path: str = "") -> dict[str, Tensor]:
    """All tensors of nested containers, copied, by path."""
    if isinstance(value, Tensor):
        return {path: value.detach().clone()}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else []
    return {name: tensor for key, item in items for name, tensor in tensors(item, f"{path}/{key}").items()}


def all_of(engine: Any) -> dict[str, Tensor]:
    return tensors([engine.module.state_dict(), engine.optimizer.state_dict()])


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return [name for name in a.keys() | b.keys() if name not in a or name not in b or not torch.equal(a[name], b[name])]


def committed(folder: Path) -> list[int]:
    return [info.step for info in list_steps(folder) if info.status == "committed"]


@contextmanager
def held_copies() -> Iterator[threading.Event]:
    """No tensor is copied in the background before the event is set."""
    copy, go = Snapshot.copy, threading.Event()

    def copy_later(self: Snapshot, index: int, target: Tensor, **more: Any) -> int:
        part = self._parts[index]
        assert part is not None
        if not part.eager:
            assert go.wait(60.0)
        return copy(self, index, target, **more)

    Snapshot.copy = copy_later  # type: ignore[method-assign]
    try:
        yield go
    finally:
        Snapshot.copy = copy  # type: ignore[method-assign]


def resumed(rank: int, kind: str, folder: str) -> dict[str, Any]:
    engine, events = made(kind), list[Event]()
    with attach(engine, CONFIG, on_event=events.append) as own:
        assert engine.load_checkpoint(folder) == (None, None)
        train(engine, rank, 4)
        with held_copies() as go:
            engine.save_checkpoint(folder, client_state={"seen": (1, {2: "two"}), "noise": torch.ones(3)})
            at_save = all_of(engine)
            losses = []
            for micro in range(engine.gradient_accumulation_steps()):
                losses.append(forward_backward(engine, rank, micro))
                if engine.is_gradient_accumulation_boundary():
                    threading.Timer(0.2, go.set).start()
                assert not go.is_set()  # nothing is copied yet
                engine.step()
            assert go.is_set() or (kind, rank) == ("zero0", 1)  # the update has waited, where anything is saved
        losses += train(engine, rank, 1)
        straight = all_of(engine)
        engine.save_checkpoint(folder, tag="six")
        assert own.is_decoupled()
    assert [event.step for event in events if isinstance(event, CheckpointSaved)] == [4, 6]
    assert "save_checkpoint" not in vars(engine)

    engine = made(kind)
    with attach(engine, CONFIG):
        path, client_state = engine.load_checkpoint(folder, tag="global_step4")
        assert path is not None
        assert Path(path).is_dir()
        changed = differing(all_of(engine), at_save)
        again = train(engine, rank, 2)
        return {
            "client_state": {key: client_state[key] for key in ("seen", "noise")},
            "changed": changed,
            "losses": again == losses,
            "differing": differing(all_of(engine), straight),
            "compared": len(straight),
        }


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_same_bits(two_ranks: Ranks, kind: str, tmp_path: Path) -> None:
    for rank, found in enumerate(two_ranks.run(resumed, kind, str(tmp_path))):
        state = found["client_state"]
        assert state["seen"] == (1, {2: "two"})
        assert torch.equal(state["noise"], torch.ones(3))
        assert found["compared"] > 5
        assert found["losses"], rank
        assert not found["differing"]
        assert not found["changed"]
    # Going back to step 4 has set the other future aside.
    assert committed(tmp_path) == [4]
    assert not verify(tmp_path, 4).problems
    assert not (tmp_path / "latest").exists()


def killed_in_the_commit(rank: int, folder: str) -> None:
    """Step 2 is committed; rank 0 dies where it would write the commit record of step 4."""
    engine = made("zero2")
    attach(engine, CONFIG)
    train(engine, rank, 2)
    engine.save_checkpoint(folder)
    train(engine, rank, 2)
    put_atomic = LocalStore.put_atomic

    def put_atomic_or_die(store: LocalStore, path: str, data: bytes) -> None:
        if path == "step_00000004/commit.json":
            os.kill(os.getpid(), signal.SIGKILL)
        put_atomic(store, path, data)

    LocalStore.put_atomic = put_atomic_or_die  # type: ignore[method-assign]
    engine.save_checkpoint(folder)
    train(engine, rank, 1)


def loaded(rank: int, folder: str) -> tuple[int, list[str]]:
    engine, events = made("zero2"), list[Event]()
    with attach(engine, CONFIG, on_event=events.append):
        path, _ = engine.load_checkpoint(folder)
        assert f"step_{engine.global_steps:08d}" in path
        train(engine, rank, 1)
        if engine.global_steps == 3:
            train(engine, rank, 1)
            engine.save_checkpoint(folder, tag="again")
    return engine.global_steps, [event.file for event in events if isinstance(event, CheckpointRejected)]


@pytest.mark.slow
@needs_deepspeed
def test_what_is_torn_or_damaged_is_never_loaded(two_ranks: Ranks, tmp_path: Path) -> None:
    dying = Ranks(2)
    try:
        dying.run(load)
        dying.start(killed_in_the_commit, str(tmp_path))
        assert dying.ended(0, 60) == -signal.SIGKILL
    finally:
        dying.close()
    assert committed(tmp_path) == [2]
    (tmp_path / "latest").write_text("global_step4")  # what DeepSpeed would have left is not believed
    # Resumed from step 2; what was written of step 4 is reported.
    found = two_ranks.run(loaded, str(tmp_path))
    assert found == [(4, ["commit.json"]), (4, [])]
    assert committed(tmp_path) == [2, 4]

    chunk = next(tmp_path.glob("step_00000004/rank_00001/*optim_states.pt/**/c.0"))
    data = bytearray(chunk.read_bytes())
    data[3] ^= 1
    chunk.write_bytes(data)
    found = two_ranks.run(loaded, str(tmp_path))
    assert [step for step, _ in found] == [4, 4]
    assert found[0][1] == [str(chunk.relative_to(tmp_path / "step_00000004"))]
    assert list(tmp_path.glob("step_00000004.aside-*"))


def refused(rank: int, folder: str) -> list[str]:
    def error(act: Any, kind: type[CheckpointError] = CheckpointError) -> str:
        with pytest.raises(kind) as caught:
            act()
        assert caught.value.fix
        return str(caught.value)

    engine = made("zero2")
    found = [error(lambda: attach(nn.Linear(2, 2)))]
    with suppress(NotDurable), attach(engine, CONFIG) as own:
        found.append(error(lambda: attach(engine, CONFIG)))
        # A rank's own mistake is raised on all of them.
        odd = {"args": argparse.Namespace(rate=1)} if rank == 0 else {}
        found += [
            error(lambda: engine.save_checkpoint(folder, client_state=odd)),
            error(lambda: engine.save_checkpoint(folder, save_latest=False)),
            error(lambda: engine.load_checkpoint(folder, load_module_only=True)),
        ]
        train(engine, rank, 1)
        engine.save_checkpoint(folder, tag="one")
        found += [
            error(lambda: engine.save_checkpoint(folder, tag="uno")),
            error(lambda: engine.load_checkpoint(folder, tag="two"), CheckpointNotFound),
            error(lambda: own.load(f"{folder}/one/layer_00.pt"), CheckpointNotFound),
        ]
        train(engine, rank, 1)
        engine.save_checkpoint(folder, tag="two")
        with torch.no_grad():
            engine.optimizer.single_partition_of_fp32_groups[0].add_(1.0)
        found.append(error(lambda: train(engine, rank, 1), SnapshotMutated))
    cls = type(engine)
    names = cls._get_all_ckpt_names
    try:
        cls._get_all_ckpt_names = lambda self, tag: []
        found.append(error(lambda: attach(engine, CONFIG)))
    finally:
        cls._get_all_ckpt_names = names
    return found


@pytest.mark.slow
@needs_deepspeed
def test_what_cannot_be_right_is_refused(two_ranks: Ranks, tmp_path: Path) -> None:
    expected = [
        "is not a DeepSpeedEngine",
        "writes checkpoints itself",
        "rank 0: mp_rank_00_model_states.pt: args is a argparse.Namespace",
        "save_latest = False",
        "sets newer ones aside",
        "step 1 was already saved as 'one', and cannot be saved as 'uno' too",
        "no committed checkpoint with the tag 'two'",
        "has no layer_00.pt",
        "tensors/optimizer_state_dict/single_partition_of_fp32_groups/0",
        "takes ('tag',), expected",
    ]
    for found in two_ranks.run(refused, str(tmp_path)):
        assert len(found) == len(expected)
        for message, part in zip(found, expected, strict=True):
            assert part in message
    # What was given up is gone; the one before it is whole.
    assert committed(tmp_path) == [1]


def exported(rank: int, folder: str) -> None:
    engine = made("zero2-bf16")
    with attach(engine, CONFIG) as own:
        train(engine, rank, 1)
        engine.save_checkpoint(folder)
        engine.save_16bit_model(folder, "model.bin")
        scaler = import_module("deepspeed.runtime.fp16.loss_scaler")
        engine.checkpoint_engine.get_commit_info()
        engine.load_checkpoint(folder)  # waits until it is committed
        states = own.load(f"{folder}/global_step1/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        inner = states["optimizer_state_dict"]
        assert type(inner["loss_scaler"]) is scaler.LossScaler
        assert inner["loss_scaler"].cur_scale == engine.optimizer.loss_scaler.cur_scale
        assert inner["zero_stage"] == 2
        # fp16 is not there on this device; its scaler is.
        dynamic = scaler.DynamicLossScaler(2**10, 1000, 1.0, 2, False, True, torch.half)
        taken = take_apart(dynamic, "", kinds_of_deepspeed(), lambda path, tensor: True)
        again = put_together(taken.skeleton, {}, {}, kinds=kinds_of_deepspeed(), device=torch.device("cpu"), where="")
        assert type(again) is scaler.DynamicLossScaler
        assert vars(again) == vars(dynamic)
        assert type(inner["param_slice_mappings"][0]) is OrderedDict
        model = own.load(f"{folder}/global_step1/mp_rank_00_model_states.pt", map_location="meta")
        assert model["module"]["first.weight"].is_meta
        assert list(model["module"]) == list(engine.module.state_dict())
        assert model["module"]._metadata == engine.module.state_dict()._metadata
        if rank == 0:
            export = own.load(f"{folder}/model.bin")
            assert torch.equal(export["first.weight"], engine.module.first.weight)
        other = Path(folder, "other")
        other.mkdir(exist_ok=True)
        (other / "latest").write_text("global_step9")
        with pytest.raises(CheckpointError, match="checkpoints in DeepSpeed's own format"):
            engine.load_checkpoint(other)
    engine.destroy()


@pytest.mark.slow
@needs_deepspeed
def test_files_are_read_by_tag_and_exports_stay_deepspeeds(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(exported, str(tmp_path))


def test_a_missing_deepspeed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)
    with pytest.raises(MissingDependency, match=r"outlast\[deepspeed\]"):
        attach(object())
