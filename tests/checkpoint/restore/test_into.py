"""Restoring into tensors that are there: whatever they look like, they hold the step then, or were not touched."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from outlast.errors import CheckpointError, CorruptCheckpoint, StateMismatch
from tests.checkpoint.damage import flip
from tests.checkpoint.helpers import checkpointer, save_steps
from tests.checkpoint.states import local, same, state

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)


def made(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
    """Memory for a tensor."""
    if layout == "transposed" and len(shape) > 1:
        return torch.zeros(*reversed(shape), dtype=dtype).permute(*reversed(range(len(shape))))
    if layout == "strided":
        return torch.zeros(*shape, 2, dtype=dtype)[..., 1]
    return torch.zeros(shape, dtype=dtype)


@given(
    tensors=st.lists(
        st.tuples(
            st.lists(st.integers(0, 40), max_size=3).map(tuple),
            st.sampled_from(DTYPES),
            st.sampled_from(["plain", "transposed", "strided"]),
        ),
        min_size=1,
        max_size=5,
    ),
    chunk_bytes=st.integers(64, 4000),
    pack_below_bytes=st.sampled_from([0, 200]),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tensor(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[Any], chunk_bytes: int, pack_below_bytes: int
) -> None:
    url = tmp_path_factory.mktemp("into")
    saved = {f"t{n}": (torch.rand(shape) * 3).to(dtype) for n, (shape, dtype, _) in enumerate(tensors)}
    into = {f"t{n}": made(*of) for n, of in enumerate(tensors)}
    with checkpointer(url, chunk_mb=chunk_bytes / 1e6, pack_below_kb=pack_below_bytes / 1e3) as saver:
        saver.save(1, replicated={"model": saved}, local={})
    with checkpointer(url) as reader:
        back = reader.restore("auto", into={"model": into})
    assert back is not None
    for name, tensor in into.items():
        assert back.replicated["model"][name] is tensor
        assert same(tensor.clone(memory_format=torch.contiguous_format), saved[name])


def test_a_model_and_its_optimizer(tmp_path: Path) -> None:
    def running(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
        torch.manual_seed(seed)
        model = nn.Linear(8, 8)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        return model, optimizer, {"model": dict(model.named_parameters()), "optimizer": optimizer.state_dict()["state"]}

    before, _, saved = running(1)
    with checkpointer(tmp_path) as saver:
        saver.save(1, replicated=saved, local={})
    after, optimizer, into = running(2)
    assert not torch.equal(before.weight, after.weight)
    with checkpointer(tmp_path) as reader:
        reader.restore("auto", into=into)
    assert torch.equal(before.weight, after.weight)
    assert after.weight.requires_grad
    optimizer.step()
    assert not torch.equal(before.weight, after.weight)


def test_a_damaged_step_leaves_the_one_before_there(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    flip(tmp_path / "step_00000002" / "model" / "blocks.0.attn.qkv.weight" / "c.0.0")
    into = state(99)
    with checkpointer(tmp_path) as reader:
        with pytest.raises(CorruptCheckpoint, match="qkv"):
            reader.restore(2, into=into)
        back = reader.restore("auto", into=into)
    assert back is not None
    assert back.step == 1
    assert same(into["model"], state(1)["model"])
    assert same(back.replicated, state(1)), "values that are no tensors come with the tensors"
    assert same(back.local, local(1))
    assert into["scheduler"]["last_step"] == 99, "what was given is not changed but for its tensors"


def test_what_does_not_fit_is_not_touched(tmp_path: Path) -> None:
    save_steps(tmp_path / "some", 1)
    into = state(99)
    into["model"]["another"] = torch.zeros(3)
    before = copy.deepcopy(into)
    with checkpointer(tmp_path / "some") as reader, pytest.raises(StateMismatch, match="model/another: in the running"):
        reader.restore("auto", into=into)
    with checkpointer(tmp_path / "none") as reader:
        assert reader.restore("auto", into=into) is None
    assert same(into, before)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(4, 6, device="meta"), "'model/w' cannot be restored into: it is on the meta device"),
        (
            torch.zeros(4, 1).expand(4, 6),
            "'model/w' cannot be restored into: it is expanded, so its elements share memory",
        ),
    ],
)
def test_what_cannot_be_filled_is_refused(tmp_path: Path, tensor: torch.Tensor, said: str) -> None:
    with checkpointer(tmp_path) as reader, pytest.raises(CheckpointError, match=said):
        reader.restore("auto", into={"model": {"w": tensor}})


def test_one_of_the_two(tmp_path: Path) -> None:
    with checkpointer(tmp_path) as reader, pytest.raises(CheckpointError, match="both like and into"):
        reader.restore("auto", like=state(1), into=state(1))
