"""What copies from a device are made of, as far as a CPU shows it: fingerprints, and copies that run ahead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from outlast.checkpoint import CheckpointConfig, Checkpointer
from outlast.checkpoint.save.fingerprint import SAMPLES, Fingerprint
from outlast.checkpoint.save.snapshot import Snapshot


def tensors() -> list[torch.Tensor]:
    base = torch.arange(240.0).view(12, 20)
    return [
        base.clone(),
        base.t(),
        torch.zeros(0),
        torch.tensor(3.0),
        base[::2, 1::3].clone()[:, :2],
        torch.arange(70, dtype=torch.int64),
        torch.ones(33, dtype=torch.bfloat16),
        torch.full((5,), torch.nan),
        torch.zeros(9, dtype=torch.bool),
    ]


def test_nothing_changed_nothing_differs() -> None:
    fingerprint = Fingerprint(tensors())
    assert fingerprint.first(fingerprint.compare()) is None


@pytest.mark.parametrize("index", [0, 1, 3, 4, 5, 6, 7, 8])
def test_a_change_behind_autograd_names_the_tensor(index: int) -> None:
    held = tensors()
    fingerprint = Fingerprint(held)
    changed = held[index].data
    changed.copy_(changed == 0 if changed.dtype == torch.bool else torch.full_like(changed, 77))
    assert fingerprint.first(fingerprint.compare()) == index


def test_a_last_update_changes_some_of_the_elements_looked_at() -> None:
    """One in a hundred elements of a large tensor, anywhere, need not be seen; an update of all of them is."""
    x = torch.zeros(10_000)
    fingerprint = Fingerprint([x])
    x += 1e-30
    assert int(fingerprint.compare().sum()) == SAMPLES


@pytest.mark.parametrize("host_memory_mb", [0.0, 0.2])
@pytest.mark.parametrize("memory", [0, 1])
def test_copies_that_run_ahead_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host_memory_mb: float, memory: int
) -> None:
    monkeypatch.setattr(Snapshot, "runs_ahead", property(lambda self: True))
    state = {f"w{number}": torch.randn(300, 64) for number in range(20)}
    config = CheckpointConfig(chunk_mb=0.02, host_memory_mb=host_memory_mb, memory_every_steps=memory)
    with Checkpointer(
        tmp_path / "c", config, rank=0, world_size=1, attempt_id="a", on_event=lambda event: None
    ) as saver:
        for step in range(2):
            saver.save(step, replicated={"m": state}, local={"e": {"x": torch.ones(1000)}}, eager={"e"})
            saver.wait_copied()
    with Checkpointer(
        tmp_path / "c", config, rank=0, world_size=1, attempt_id="b", on_event=lambda event: None
    ) as saver:
        restored = saver.restore("auto")
    assert restored is not None
    assert restored.step == 1
    assert all(torch.equal(restored.replicated["m"][name], tensor) for name, tensor in state.items())
