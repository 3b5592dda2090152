"""Tensors whose elements are not in memory of their own are named before an address is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from outlast.checkpoint.save.plan import plan_rank
from outlast.checkpoint.save.snapshot import Snapshot
from outlast.checkpoint.state.tensors import as_plain
from outlast.checkpoint.state.tree import StateTree, lay_out
from outlast.errors import CheckpointError, SnapshotMutated
from tests.checkpoint.helpers import checkpointer


class Mine(torch.Tensor):
    """A class of tensors without a `__torch_dispatch__` of its own."""


class Logging(torch.Tensor):
    """One that answers operations itself."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def freed() -> torch.Tensor:
    tensor = torch.ones(1000)
    tensor.untyped_storage().resize_(0)
    return tensor


def cut_off(stride: int = 1) -> torch.Tensor:
    tensor = torch.ones(1000)[::stride]
    tensor.untyped_storage().resize_(400)
    return tensor


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(1000)


REFUSED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "freed": (freed, "which has 0"),
    "cut off": (cut_off, "needs 4000 bytes of its storage, which has 400"),
    "cut off, strided": (lambda: cut_off(2), "needs 3996 bytes of its storage, which has 400"),
    "fake": (fake, "FakeTensor, which has no memory of its own"),
    "functional": (lambda: torch._to_functional_tensor(torch.ones(1000)), "is a functional tensor"),
    "jagged": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "Nested"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "is a nested tensor"),
    "sparse": (lambda: torch.ones(1000).to_sparse(), "torch.sparse_coo"),
    "compressed": (lambda: torch.ones(10, 10).to_sparse_csr(), "torch.sparse_csr"),
    "mkldnn": (lambda: torch.ones(1000).to_mkldnn(), "torch._mkldnn"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(9), 1.0, 0, torch.qint8), "qint8"),
    "meta": (lambda: torch.empty(1000, device="meta"), "is meta"),
    "zero": (lambda: torch._efficientzerotensor(1000), "zero without memory"),
    "lazy": (lambda: torch.nn.LazyLinear(3).weight, "without a shape yet"),
    "dispatching": (lambda: torch.ones(1000).as_subclass(Logging), "Logging"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_memory_of_its_own_is_named(tmp_path: Path, kind: str) -> None:
    make, word = REFUSED[kind]
    with checkpointer(tmp_path) as saver:
        for eager in ((), ("model",)):
            with pytest.raises(CheckpointError, match="'model/w'") as error:
                saver.save(1, replicated={"model": {"w": make()}}, eager=eager)
            assert word in str(error.value)
        saver.save(2, replicated={"model": {"w": torch.ones(1000)}})
        if kind not in ("quantized", "zero", "cut off", "cut off, strided"):
            with pytest.raises(CheckpointError, match="'model/w'"):
                saver.restore(2, into={"model": {"w": make()}})


@pytest.mark.filterwarnings("ignore")
def test_inside_of_a_transformation(tmp_path: Path) -> None:
    def save(x: torch.Tensor) -> torch.Tensor:
        with pytest.raises(CheckpointError, match=r"'model/w' belongs to a transformation of torch\.func"):
            saver.save(1, replicated={"model": {"w": x}})
        return x

    with checkpointer(tmp_path) as saver:
        torch.func.vmap(save)(torch.ones(2, 3))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3).as_subclass(Mine),
        torch.zeros(1).expand(5, 2),
        torch.arange(12.0).reshape(3, 4).T[1:],
        torch.tensor([1 + 2j]).conj(),
        torch.empty(0)[0:],
        torch.nn.Parameter(torch.ones(2)),
    ],
    ids=["subclass", "expanded", "view", "conjugate", "empty", "parameter"],
)
def test_whatever_lies_in_its_storage_is_stored(tmp_path: Path, tensor: torch.Tensor) -> None:
    with checkpointer(tmp_path) as saver:
        saver.save(1, replicated={"model": {"w": tensor}})
        back = saver.restore(1)
    assert back is not None
    plain = tensor.detach().as_subclass(torch.Tensor)
    assert type(back.replicated["model"]["w"]) is torch.Tensor
    assert torch.equal(back.replicated["model"]["w"], plain)


def test_a_plain_view_shares_memory_and_version() -> None:
    tensor = torch.ones(3).as_subclass(Mine)
    plain = as_plain(tensor, "w")
    tensor.add_(1)
    assert plain._version == tensor._version
    assert torch.equal(plain, torch.full((3,), 2.0))


@pytest.mark.parametrize("left_bytes", [0, 8], ids=["freed", "cut off"])
def test_memory_that_is_freed_before_it_is_copied_is_not_read(left_bytes: int) -> None:
    tensor, tree = torch.ones(1000), StateTree()
    lay_out(tree, {"model": {"w": tensor}}, "", ())
    plan = plan_rank(tree, StateTree(), 0, 1, chunk_bytes=1 << 20, pack_below_bytes=0)
    snapshot = Snapshot(plan.parts)
    tensor.untyped_storage().resize_(left_bytes)
    with pytest.raises(SnapshotMutated, match=r"'model/w' was changed .*freed"):
        snapshot.copy(0, torch.empty(8192, dtype=torch.uint8))
    with pytest.raises(SnapshotMutated, match=r"'model/w' was changed .*freed"):
        snapshot.check()
