"""Tensors that wrap other tensors are stored by their inner tensors, and made again only like a running one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from outlast.checkpoint.tools import verify
from outlast.errors import CheckpointError, SnapshotMutated, StateMismatch
from tests.checkpoint.helpers import checkpointer
from tests.checkpoint.states import same


class Quantised(torch.Tensor):
    """8-bit integers with a scale for each row, as torchao has them: a context with a dtype and a tuple in it."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor, block: tuple[int, ...], dtype: torch.dtype) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=dtype, device=data.device)  # type: ignore[attr-defined]

    def __init__(self, data: torch.Tensor, scale: torch.Tensor, block: tuple[int, ...], dtype: torch.dtype) -> None:
        self.int_data, self.scale, self.block = data, scale, block

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["int_data", "scale"], {"block": self.block, "dtype": self.dtype}

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, size: Any, stride: Any) -> Any:
        return cls(inner["int_data"], inner["scale"], context["block"], context["dtype"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            own = args[0]
            return cls(own.int_data.detach(), own.scale.detach(), own.block, own.dtype)
        raise NotImplementedError(str(func))


class Strange(TwoTensor):
    """Its context cannot be stored."""

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["a", "b"], {"hook": print}


def quantised(seed: int, block: tuple[int, ...] = (1, 32)) -> Any:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(-128, 128, (4, 32), generator=generator).to(torch.int8)
    return Quantised(data, torch.rand(4, 1, generator=generator), block, torch.bfloat16)


def two(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return TwoTensor(torch.rand(3, 5, generator=generator), torch.rand(3, 5, generator=generator))


def nested(seed: int) -> Any:
    """A wrapper of wrappers."""
    return TwoTensor(two(seed), two(seed + 1))


MAKE = {"two": two, "quantised": quantised, "nested": nested, "parameter": lambda seed: nn.Parameter(two(seed))}


def inner(tensor: Any) -> Any:
    """All that is in it."""
    if not hasattr(type(tensor), "__tensor_flatten__"):
        return tensor.detach().clone()
    return {name: inner(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]}


@pytest.mark.parametrize("pack_below_kb", [0, 64], ids=["files", "packed"])
@pytest.mark.parametrize("kind", MAKE)
def test_a_wrapper_comes_back(tmp_path: Path, kind: str, pack_below_kb: int) -> None:
    make = MAKE[kind]
    saved, other = make(1), make(2)
    with checkpointer(tmp_path, pack_below_kb=pack_below_kb) as saver:
        saver.save(1, replicated={"model": {"w": saved, "b": torch.ones(2)}, "list": [saved]}, eager=("list",))
        bare = saver.restore(1)
        alike = saver.restore(1, like={"model": {"w": other, "b": torch.ones(2)}, "list": [other]})
        assert not same(inner(other), inner(saved))  # `like` changes nothing
        running = make(3)
        into = saver.restore(1, into={"model": {"w": other, "b": torch.ones(2)}, "list": [running]})
    assert bare is not None
    assert alike is not None
    assert into is not None
    assert same(bare.replicated["model"]["w"], inner(saved))
    assert type(alike.replicated["model"]["w"]) is type(saved.detach())
    assert same(inner(alike.replicated["model"]["w"]), inner(saved))
    assert same(inner(alike.replicated["list"][0]), inner(saved))
    assert into.replicated["model"]["w"] is other
    assert into.replicated["list"][0] is running
    assert same(inner(other), inner(saved))
    assert same(inner(running), inner(saved))
    assert verify(tmp_path).ok
    group = zarr.open_group(str(tmp_path / "step_00000001"), mode="r")["model/w"]
    assert group.attrs["outlast_container"]["type"] == "tensor"  # type: ignore[index,call-overload]


def test_what_the_running_tensor_is_not_is_named_before_anything_is_read(tmp_path: Path) -> None:
    saved, plain = quantised(1), torch.zeros(4, 32)
    with checkpointer(tmp_path) as saver:
        saver.save(1, replicated={"model": {"w": saved}})
        for running, word in [
            (quantised(2, block=(4, 8)), "context"),
            (TwoTensor(torch.zeros(4, 32), torch.zeros(4, 32)), "TwoTensor|model/w/a: in the running state"),
            (plain, "model/w"),
        ]:
            before = inner(running)
            for how in ("like", "into"):
                with pytest.raises(StateMismatch, match=word):
                    saver.restore(1, **{how: {"model": {"w": running}}})
            assert same(inner(running), before)
        saver.save(2, replicated={"model": {"w": plain}})
        with pytest.raises(StateMismatch, match="model/w"):
            saver.restore(2, into={"model": {"w": quantised(2)}})


@pytest.mark.parametrize("how", ["like", "into"])
def test_another_class_with_the_same_inner_tensors_is_refused(tmp_path: Path, how: str) -> None:
    class Other(TwoTensor):
        pass

    with checkpointer(tmp_path) as saver:
        saver.save(1, replicated={"model": {"w": two(1)}})
        other = Other(torch.zeros(3, 5), torch.zeros(3, 5))
        with pytest.raises(StateMismatch, match=r"'model/w': its class is .*TwoTensor"):
            saver.restore(1, **{how: {"model": {"w": other}}})  # type: ignore[arg-type]


def test_a_context_that_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with (
        checkpointer(tmp_path) as saver,
        pytest.raises(CheckpointError, match=r"'model/w' is a .*Strange, and its context"),
    ):
        saver.save(1, replicated={"model": {"w": Strange(torch.ones(2), torch.ones(2))}})


def test_inner_tensors_without_memory_are_named(tmp_path: Path) -> None:
    hollow = torch.ones(3)
    hollow.untyped_storage().resize_(0)
    with checkpointer(tmp_path) as saver, pytest.raises(CheckpointError, match="'model/w/b'"):
        saver.save(1, replicated={"model": {"w": TwoTensor(torch.ones(3), hollow)}})


def test_a_wrapper_that_is_changed_too_early_is_named(tmp_path: Path) -> None:
    tensor = two(1)
    with checkpointer(tmp_path) as saver:
        saver.save(1, replicated={"model": {"w": tensor}})
        tensor.mul_(2)
        with pytest.raises(SnapshotMutated, match=r"'model/w/[ab]'"):
            saver.wait_copied()


def test_a_model_of_wrappers_and_its_optimizer_go_on(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        model.weight = nn.Parameter(two(7))
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for step in range(2):
            model(torch.full((2, 5), float(step))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    one, other = make(), make()
    train(*one)
    train(*other)
    with checkpointer(tmp_path) as saver:
        saver.save(1, replicated={"model": one[0].state_dict(), "optimizer": one[1].state_dict()})
        saver.wait_copied()
        train(*other)
        back = saver.restore(1, into={"model": other[0].state_dict(), "optimizer": other[1].state_dict()})
    assert back is not None
    train(*one)
    train(*other)
    assert same([inner(p) for p in one[0].parameters()], [inner(p) for p in other[0].parameters()])
