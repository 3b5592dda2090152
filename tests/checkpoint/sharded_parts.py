"""What ranks do with sharded tensors of known numbers: which bytes are read, what is damaged, what is refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import ShardOrderEntry

from benchmarks.namespace import mount_over
from outlast.checkpoint import Checkpointer
from outlast.errors import NotDurable, OutlastError
from outlast.events import CheckpointRestored, CheckpointSaved, Event
from tests.checkpoint.damage import flip
from tests.checkpoint.sharded import CONFIG, Counting, Sent, checkpointer

SHAPES = {"rows": (401, 64), "columns": (64, 402), "wide": (3, 5000), "copied": (90, 64), "bias": (70,)}


def filled(step: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The whole state of a step."""
    return {
        name: (torch.arange(float(np.prod(shape))).reshape(shape) + step).to(dtype) for name, shape in SHAPES.items()
    }


def placed(mesh: DeviceMesh, step: int) -> dict[str, DTensor]:
    """The same as DTensors."""
    by = {"columns": Shard(1), "copied": Replicate()}
    return {
        name: distribute_tensor(t, mesh, [by.get(name, Shard(0))], src_data_rank=None)
        for name, t in filled(step).items()
    }


def is_right(state: dict[str, Any], mesh: DeviceMesh, step: int) -> bool:
    """Whether parts and placements are those of a step."""
    expected = placed(mesh, step)
    return state.keys() == expected.keys() and all(
        isinstance(part, DTensor)
        and part.placements == expected[name].placements
        and part.device_mesh == mesh
        and not part.requires_grad
        and torch.equal(part.to_local(), expected[name].to_local())
        for name, part in state.items()
    )


def parts(rank: int, url: str) -> dict[str, Any]:
    """What is read by which rank, and that it is right: of a step from DTensors and of one from whole tensors."""
    mesh = init_device_mesh("cpu", (4,))
    found: dict[str, Any] = {}
    with checkpointer(f"{url}/sharded", rank, chunk_mb=0.004) as saver:
        state = placed(mesh, 1)
        saver.save(1, replicated={"model": state}, local={})
        saver.close()
    with checkpointer(f"{url}/whole", rank, chunk_mb=0.004, pack_below_kb=1.0) as saver:
        saver.save(1, replicated={"model": filled(2)}, local={})
        saver.close()
    found["own"] = {name: part.to_local().nbytes for name, part in state.items()}
    dist.barrier()
    with checkpointer(f"{url}/sharded", rank) as saver, Counting() as read:
        back = saver.restore(1, like={"model": placed(mesh, 0)})
        found["sharded"], found["sharded right"] = dict(read), is_right(back.replicated["model"], mesh, 1)
        own = placed(mesh, 0)
        back = saver.restore(1, into={"model": own})
        found["into right"] = is_right(own, mesh, 1) and back.replicated["model"]["rows"] is own["rows"]
        back = saver.restore(1)
        whole_state = back.replicated["model"]
        found["without like"] = all(torch.equal(whole_state[name], t) for name, t in filled(1).items())
    with checkpointer(f"{url}/whole", rank) as saver, Counting() as read:
        back = saver.restore(1, like={"model": placed(mesh, 0)})
        found["whole"], found["whole right"] = dict(read), is_right(back.replicated["model"], mesh, 2)
    return found


def saved_to_memory(rank: int, url: str, nodes: list[str], whole: bool) -> None:
    """A step in this node's memory and its partner's, and in no storage."""
    mount_over(nodes[rank * len(nodes) // dist.get_world_size()], "/dev/shm")
    mesh, events = init_device_mesh("cpu", (dist.get_world_size(),)), list[Event]()
    saver = checkpointer(url, rank, events, memory_every_steps=1, partner_every_steps=1, chunk_mb=0.004)
    saver.save(1, replicated={"model": filled(1) if whole else placed(mesh, 1)}, local={"rank": torch.tensor(rank)})
    saver.wait_copied()
    deadline = time.monotonic() + 60
    while not any(isinstance(event, CheckpointSaved) and event.tier == "partner" for event in events):
        assert time.monotonic() < deadline, events
        time.sleep(0.01)
    dist.barrier()  # all are killed from here on


def back_from_memory(rank: int, url: str, nodes: list[str], with_like: bool) -> dict[str, Any]:
    """What comes back of it, and what this rank was sent for that."""
    ranks = dist.get_world_size()
    mount_over(nodes[rank * len(nodes) // ranks], "/dev/shm")
    mesh, events = init_device_mesh("cpu", (ranks,)), list[Event]()
    settings: dict[str, Any] = {"memory_every_steps": 1, "attempt_id": "again"}
    with checkpointer(url, rank, events, **settings) as saver, Sent() as sent:
        back = saver.restore("auto", like={"model": placed(mesh, 0)} if with_like else None)
    assert back is not None
    model = back.replicated["model"]
    right = is_right(model, mesh, 1) if with_like else all(torch.equal(model[k], t) for k, t in filled(1).items())
    (event,) = [event for event in events if isinstance(event, CheckpointRestored)]
    return {
        "right": right and torch.equal(back.local["rank"], torch.tensor(rank)),
        "own_bytes": sum(part.to_local().nbytes for part in placed(mesh, 1).values()),
        "sent_bytes": sent.bytes,
        "tiers": dict(event.tiers),
    }


def damaged(rank: int, url: str) -> int:
    """The step that is taken after a chunk was damaged which one rank alone reads."""
    mesh = init_device_mesh("cpu", (4,))
    with checkpointer(url, rank, chunk_mb=0.004) as saver:
        for step in (1, 2):
            saver.save(step, replicated={"model": placed(mesh, step)}, local={})
    dist.barrier()
    if rank == 0:
        flip(Path(url) / "step_00000002" / "model" / "rows" / "c.3.4")
    dist.barrier()
    with checkpointer(url, rank) as saver:
        back = saver.restore("auto", like={"model": placed(mesh, 0)})
        assert is_right(back.replicated["model"], mesh, back.step)
        return int(back.step)


def some_ranks(rank: int, url: str) -> str:
    """A job of ranks 3 and 1, with its own group, whose mesh is not in the order of the group."""
    group = dist.new_group([1, 3])
    mesh = DeviceMesh("cpu", [3, 1])
    if rank not in (1, 3):
        return "right"
    settings: dict[str, Any] = {"rank": dist.get_rank(group), "world_size": 2, "attempt_id": "x", "group": group}
    with Checkpointer(url, CONFIG, **settings, on_event=lambda event: None) as saver:
        saver.save(1, replicated={"model": placed(mesh, 1)}, local={})
    dist.barrier(group)
    with Checkpointer(url, CONFIG, **settings, on_event=lambda event: None) as saver:
        back = saver.restore("auto", like={"model": placed(mesh, 0)})
        assert back is not None
        return "right" if is_right(back.replicated["model"], mesh, 1) else "wrong"


def refused(rank: int, url: str) -> dict[str, str]:
    """What errors say."""
    mesh, found = init_device_mesh("cpu", (4,)), {}
    pair = DeviceMesh("cpu", [0, 1] if rank < 2 else [2, 3], _init_backend=False)

    def note(what: str, act: Callable[[], object]) -> None:
        try:
            act()
            found[what] = ""
        except OutlastError as error:
            found[what] = f"{type(error).__name__}: {error}"

    def save(state: dict[str, Any], local: dict[str, Any] | None = None) -> Callable[[], None]:
        return lambda: saver.save(1, replicated={"model": state}, local=local or {})

    with suppress(NotDurable), checkpointer(url, rank) as saver:
        partial = DTensor.from_local(torch.ones(3), mesh, [Partial()])
        note("partial", save({"w": partial}))
        note("local", save({}, {"w": placed(mesh, 1)["rows"]}))
        note("submesh", save({"w": DTensor.from_local(torch.ones(3), pair, [Shard(0)], run_check=False)}))
        square = init_device_mesh("cpu", (2, 2))
        turned = distribute_tensor(torch.ones(8), square, [Shard(0), Shard(0)], src_data_rank=None)
        turned._spec.shard_order = (ShardOrderEntry(tensor_dim=0, mesh_dims=(1, 0)),)
        note("turned", save({"w": turned}))
        prime = distribute_tensor(torch.ones(4 * 1009), mesh, [Shard(0)])
        note("grid", save({"w": prime}))
    with checkpointer(url, rank) as saver:
        state = placed(mesh, 2)
        saver.save(2, replicated={"model": state}, local={})
        saver.wait_copied()
        saver.close()
    dist.barrier()
    with checkpointer(url, rank) as saver:
        like = placed(mesh, 0)
        del like["bias"]
        like["rows"] = distribute_tensor(torch.ones(402, 64), mesh, [Shard(0)])
        like["columns"] = like["columns"].to(torch.bfloat16)
        note("mismatch", lambda: saver.restore(2, like={"model": like}))
        like = placed(mesh, 0)
        like["wide"] = distribute_tensor(torch.ones(3, 5000), mesh, [Shard(rank // 2)], src_data_rank=None)
        note("ranks differ", lambda: saver.restore(2, like={"model": like}))
        like["wide"] = DTensor.from_local(torch.ones(3), mesh, [Partial()]) if rank == 2 else placed(mesh, 0)["wide"]
        note("one rank", lambda: saver.restore("auto", like={"model": like}))
        note("fine after all", lambda: saver.restore("auto", like={"model": placed(mesh, 0)}))
    with suppress(NotDurable), checkpointer(f"{url}/mutated", rank) as saver:
        saver.save(1, replicated={"model": state}, local={})
        with torch.no_grad():
            state["columns"][40].add_(1)  # one row of 64, where no sample need be
        note("changed", saver.wait_copied)
        saver.save(2, replicated={"model": state}, local={})
        with torch.no_grad():
            state["rows"].to_local().mul_(2)
        note("part changed", saver.wait_copied)
        saver.save(3, replicated={"model": state}, local={})
        with torch.no_grad():
            torch._foreach_mul_([state["rows"]], 2.0)
        note("unheard of", saver.wait_copied)
    return found


def memory(rank: int, url: str, layers: int) -> dict[str, float]:
    """Peak of memory, in MB, of restoring a state into a model that has no memory yet, and of restoring it whole."""
    mesh = init_device_mesh("cpu", (4,))
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(2000, 1000, bias=False) for _ in range(layers)))
    fully_shard(model, mesh=mesh)
    rows = torch.full((250, 2000), float(rank))
    state = {f"{i}.weight": DTensor.from_local(rows + 10 * i, mesh, [Shard(0)], run_check=False) for i in range(layers)}
    with checkpointer(url, rank, chunk_mb=1.0) as saver:
        saver.save(1, replicated={"model": state}, local={})
    del state
    dist.barrier()
    found = {}
    with checkpointer(url, rank) as saver:
        for how, like in (("parts", {"model": model.state_dict()}), ("whole", None)):
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            before = _status_mb("VmRSS")
            back = saver.restore(1, like=like)
            found[how] = _status_mb("VmHWM") - before
            assert back is not None
            if like is not None:
                model.load_state_dict(back.replicated["model"], assign=True)
    for i, layer in enumerate(model):
        assert torch.equal(layer.weight.to_local(), rows + 10 * i)
    return found


def _status_mb(what: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024 / 1e6
