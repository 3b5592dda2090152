"""What real ranks restore that is not quite what was saved: sharded or whole, from storage or memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from outlast.checkpoint import Checkpointer, Restored
from outlast.errors import OutlastError
from outlast.events import CheckpointFailed, Event
from tests.checkpoint.sharded import checkpointer, run
from tests.checkpoint.sharded_training import arrays, whole

MEMORY = {"memory_every_steps": 1}
TIERS = pytest.mark.parametrize("settings", [{}, MEMORY], ids=["storage", "memory"])
LAST = 6


class Net(nn.Module):
    """Its gate is used from the fifth step on; until then it has no gradient."""

    def __init__(self, classes: int = 5, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up = nn.Linear(6, 21, dtype=dtype)
        self.gate = nn.Linear(6, 21, dtype=dtype)
        self.down = nn.Linear(21, classes, dtype=dtype)

    def forward(self, x: torch.Tensor, step: int) -> torch.Tensor:
        hidden = self.up(x)
        y: torch.Tensor = self.down(hidden * self.gate(x).sigmoid() if step > 4 else hidden)
        return y


class Job:
    """One rank; the recipe of the docs."""

    def __init__(self, **net: Any) -> None:
        self.model = Net(**net)
        fully_shard(self.model.up)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)

    def state(self) -> dict[str, Any]:
        of_model, of_optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": of_model, "optimizer": of_optimizer}

    def set(self, restored: Restored) -> None:
        back = restored.replicated
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=back["model"],
            optim_state_dict=back["optimizer"],
            options=StateDictOptions(strict=False),
        )

    def train(self, step: int) -> None:
        x = torch.randn(12, 6, generator=torch.Generator().manual_seed(step))
        self.optimizer.zero_grad()
        self.model(x, step).square().mean().backward()
        self.optimizer.step()


def straight(rank: int, url: str, save: int, settings: dict[str, Any]) -> Any:
    """To the end, with one step saved on the way, by an optimizer whose state nobody has made."""
    job, events = Job(), list[Event]()
    with checkpointer(url, rank, events, **settings) as saver:
        for step in range(1, LAST + 1):
            job.train(step)
            if step == save:
                state = {"model": job.model.state_dict(), "optimizer": get_state_dict(job.model, job.optimizer)[1]}
                assert any("gate" in name for name in state["optimizer"]["state"]) == (step > 4)
                saver.save(step, replicated=state, local={"rank": rank})
                saver.wait_copied()
    assert not [event for event in events if isinstance(event, CheckpointFailed)]
    return arrays(whole(job.state()))


def resumed(rank: int, url: str, settings: dict[str, Any]) -> Any:
    job = Job()
    with checkpointer(url, rank, attempt_id="second", **settings) as reader:
        said = refusal(reader, like=job.state(), any_world_size=True)
        assert "never had a gradient" in said, said
        assert "pass strict=('model',)" in said, said
        back = reader.restore("auto", like=job.state(), any_world_size=True, strict=("model",))
        assert back is not None
        assert {mismatch.name.split("/")[2] for mismatch in back.not_taken} == {"gate.weight", "gate.bias"}
        assert {mismatch.kind for mismatch in back.not_taken} == {"missing"}
        job.set(back)
        assert job.model.gate.weight not in job.optimizer.state
        for step in range(back.step + 1, LAST + 1):
            job.train(step)
    return arrays(whole(job.state()))


def refusal(reader: Checkpointer, **arguments: Any) -> str:
    try:
        reader.restore("auto", **arguments)
    except OutlastError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("ranks", [2, 3])
@TIERS
def test_a_parameter_without_gradients_is_no_obstacle(tmp_path: Path, ranks: int, settings: dict[str, Any]) -> None:
    ended = run(2, straight, str(tmp_path), 3, settings)
    again = run(ranks, resumed, str(tmp_path), settings)
    for one, other in zip(ended[:1] * ranks, again, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            if ranks == 2:
                assert one[name].tobytes() == other[name].tobytes(), name
            else:
                np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-6, err_msg=name)


def other_model(rank: int, url: str, settings: dict[str, Any]) -> Any:
    """A new head, half precision, a part alone, and other names; on sharded tensors."""
    found: dict[str, Any] = {}
    with checkpointer(url, rank, attempt_id="second", **settings) as reader:
        head = Job(classes=7)
        into = {"model": head.model.state_dict()}
        before = whole(into["model"])
        found["strict"] = refusal(reader, into=into, parts=("model",), any_world_size=True)
        back = reader.restore("auto", into=into, parts=("model",), strict=False, any_world_size=True)
        assert back is not None
        found["head"] = [(mismatch.name, mismatch.kind) for mismatch in back.not_taken]
        after = whole(head.model.state_dict())
        found["kept"] = all(np.array_equal(after[name], before[name]) for name in ("down.weight", "down.bias"))
        found["taken"] = {name: after[name] for name in ("up.weight", "gate.weight")}

        half = Job(dtype=torch.bfloat16)
        like = {"model": half.model.state_dict()}
        found["dtype"] = refusal(reader, like=like, parts=("model",), any_world_size=True)
        back = reader.restore("auto", like=like, parts=("model",), cast=True, any_world_size=True)
        assert back is not None
        tensor = back.replicated["model"]["up.weight"]
        assert isinstance(tensor, DTensor)
        assert tensor.dtype == torch.bfloat16
        found["half"] = tensor.full_tensor().float().numpy()

        plain = Job()
        renamed = {"net": {f"_orig_mod.{name}": part for name, part in plain.model.state_dict().items()}}
        back = reader.restore("auto", into=renamed, rename={"model/": "net/"}, strict=("net",), any_world_size=True)
        assert back is not None
        found["renamed"] = whole(plain.model.state_dict())

        # What one rank asks for otherwise, no rank gets.
        found["parts differ"] = refusal(reader, into=into, parts=("model",) if rank else ("optimizer",))
        found["one cannot"] = refusal(reader, into=into, rename=3 if rank else None)
        found["one renames"] = refusal(
            reader,
            into=renamed,
            parts=("model",),
            rename=lambda name: name if rank else name.replace("model", "net"),
            any_world_size=True,
        )
    return found


@pytest.mark.parametrize("ranks", [2, 3])
@TIERS
def test_other_models(tmp_path: Path, ranks: int, settings: dict[str, Any]) -> None:
    saved = run(2, straight, str(tmp_path), LAST, {**settings, "chunk_mb": 0.0002})[0]
    for found in run(ranks, other_model, str(tmp_path), settings):
        assert "pass strict=False" in found["strict"]
        assert found["head"] == [("model/down.bias", "shape"), ("model/down.weight", "shape")]
        assert found["kept"]
        for name, tensor in found["taken"].items():
            assert np.array_equal(tensor, saved[f"model/{name}"])
        assert "pass cast=True" in found["dtype"]
        up = torch.from_numpy(saved["model/up.weight"]).bfloat16().float().numpy()
        assert np.array_equal(found["half"], up)
        assert all(np.array_equal(tensor, saved[f"model/{name}"]) for name, tensor in found["renamed"].items())
        assert found["parts differ"].startswith("StateMismatch: ranks ")
        assert "rank 1: rename = 3" in found["one cannot"]
        assert found["one renames"].startswith("StateMismatch: ")


def under_ddp(rank: int, url: str, settings: dict[str, Any]) -> Any:
    """Saved under DDP, and taken without it, and the other way round."""
    ddp, plain = DistributedDataParallel(Net()), Net(classes=5)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    with checkpointer(url, rank, **settings) as saver:
        saver.save(1, replicated={"model": ddp.state_dict()}, local={})
        saver.wait_copied()
    with checkpointer(url, rank, attempt_id="second", **settings) as again:
        back = again.restore("auto", into={"model": plain.state_dict()})
        assert back is not None
        assert sorted(back.replicated["model"]) == sorted(plain.state_dict())
        for one, other in zip(plain.parameters(), ddp.module.parameters(), strict=True):
            assert torch.equal(one, other)
        again.save(2, replicated={"model": plain.state_dict()}, local={})
        again.wait_copied()
        with torch.no_grad():
            for parameter in ddp.module.parameters():
                parameter.zero_()
    with checkpointer(url, rank, attempt_id="third", **settings) as last:
        assert last.restore(2, into={"model": ddp.state_dict()}) is not None
    dist.barrier()
    return all(torch.equal(one, other) for one, other in zip(plain.parameters(), ddp.module.parameters(), strict=True))


@TIERS
def test_names_are_the_same_under_ddp(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert run(2, under_ddp, str(tmp_path), settings) == [True, True]
