"""Jobs of FSDP2 ranks over gloo, forked from a server that has torch and DTensor loaded."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # the first DTensor imports it, which takes a second; here it is done once for all ranks
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from outlast.checkpoint import CheckpointConfig, Checkpointer, attach
from outlast.checkpoint._store import LocalStore
from outlast.errors import OutlastError
from outlast.events import CheckpointFailed, Event
from tests.checkpoint.helpers import flip

LIMIT_S = 90.0
CONFIG = CheckpointConfig(commit_timeout_s=60.0, keep_last=0, io_threads=2, chunk_mb=0.0003, pack_below_kb=0.1)
"""Chunks of 300 bytes, so that some shards are several; scalars are packed, biases are not."""
BATCH = 12


def run(world_size: int, function: Callable[..., Any], *args: object) -> list[Any]:
    """``function(rank, *args)`` on so many ranks of a job of its own; what each returns, by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.checkpoint.sharded"])
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank, args=(theirs, rank, world_size, folder, function, args), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        deadline, found = time.monotonic() + LIMIT_S, []
        try:
            for rank, pipe in enumerate(pipes):
                assert pipe.poll(max(0.0, deadline - time.monotonic())), f"rank {rank} of {world_size} does not answer"
                ok, value = pipe.recv()
                assert ok, f"rank {rank}:\n{value}"
                found.append(value)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return found


def _rank(
    pipe: Connection, rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        pipe.send((True, function(rank, *args)))
    except Exception:
        pipe.send((False, traceback.format_exc()))
    time.sleep(LIMIT_S)  # a group of which one rank is gone is an error for the others; all are killed in the end
    os._exit(1)


class Model(nn.Module):
    """Rows that ranks cannot share evenly, and fewer of them than ranks."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up = nn.Linear(10, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.down = nn.Linear(hidden, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.tanh(self.norm(self.up(x))))
        return y


@dataclass(frozen=True)
class Sharding:
    """How a job shards its model."""

    mesh: tuple[int, ...]
    """One dimension: FSDP2. Two: HSDP, copies first, or (``tensor_parallel``) FSDP2 over tensor parallelism."""
    tensor_parallel: bool = False
    without_norm: bool = False
    """The norm would need a tensor-parallel plan of its own."""
    hidden: int = 21
    integer_keys: bool = False
    """The optimizer's state as ``optimizer.state_dict()`` has it."""


class Job:
    """One rank of a training."""

    def __init__(self, rank: int, sharding: Sharding) -> None:
        self.rank, self.sharding = rank, sharding
        names = ("copies", "shards") if len(sharding.mesh) == 2 else ("shards",)
        self.mesh = init_device_mesh("cpu", sharding.mesh, mesh_dim_names=names)
        self.model = Model(sharding.hidden)
        if sharding.without_norm:
            del self.model.norm
            self.model.norm = nn.Identity()
        over = self.mesh
        if sharding.tensor_parallel:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(self.model, self.mesh["shards"], plan)
            over = self.mesh["copies"]
        fully_shard(self.model.up, mesh=over)
        fully_shard(self.model, mesh=over)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, betas=(0.8, 0.95))

    def state(self) -> dict[str, Any]:
        """What is saved; the optimizer's state is made if there is none yet."""
        named = get_optimizer_state_dict(self.model, self.optimizer)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.sharding.integer_keys else named,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.sharding.integer_keys:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])

    def train(self, step: int) -> None:
        """One step; the same numbers, whatever the ranks are."""
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 10, generator=generator)
        readers = self.mesh["copies"] if self.sharding.tensor_parallel else None
        count = readers.size() if readers else dist.get_world_size()
        mine = (readers.get_local_rank() if readers else self.rank) * (BATCH // count)
        x = x[mine : mine + BATCH // count]
        self.optimizer.zero_grad()
        (self.model(x) - x[:, :3].square()).square().mean().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def whole(state: Any) -> Any:
    """A state with full arrays in place of tensors; collective."""
    if isinstance(state, DTensor):
        return state.full_tensor().detach().numpy().copy()
    if isinstance(state, torch.Tensor):
        return state.detach().numpy().copy()
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return state


def checkpointer(url: str, rank: int, events: list[Event] | None = None, **settings: Any) -> Checkpointer:
    emit = (lambda event: None) if events is None else events.append
    ranks = dist.get_world_size()
    return Checkpointer(url, replace(CONFIG, **settings), rank=rank, world_size=ranks, epoch=f"of {ranks}", emit=emit)


class Counting:
    """What this rank reads of chunks, in bytes, by file."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self._read = LocalStore.read

    def __enter__(self) -> dict[str, int]:
        def read(store: LocalStore, path: str) -> Any:
            data = self._read(store, path)
            if path.rpartition("/")[2].startswith("c.") and "/packed/" not in path:
                self.bytes[path.partition("/")[2]] = len(data)
            return data

        LocalStore.read = read  # type: ignore[method-assign]
        return self.bytes

    def __exit__(self, *error: object) -> None:
        LocalStore.read = self._read  # type: ignore[method-assign]


@dataclass
class Leg:
    """What a rank did between two starts."""

    restored: Any
    """Whole state right after the restore; None at the beginning."""
    saved: dict[int, Any]
    """Whole state after those steps that were saved."""
    ended: Any
    failures: list[str]
    read: dict[str, int]
    kinds: set[str]
    """Types of restored tensors, and where their parts lie."""


def train(rank: int, url: str, sharding: Sharding, last: int, save: tuple[int, ...], restore: bool) -> Leg:
    """A leg of a training: from the newest step on, if ``restore``, to the ``last``."""
    job, events, restored, first, kinds = Job(rank, sharding), list[Event](), None, 1, set[str]()
    saved: dict[int, Any] = {}
    with checkpointer(url, rank, events) as saver:
        with Counting() as read:
            back = saver.restore("auto", like=job.state(), any_world_size=True) if restore else None
        if back is not None:
            tensors = back.replicated["model"].values()
            kinds = {f"{type(t).__name__} {t.placements} {t.to_local().device}" for t in tensors}
            job.load(back.replicated)
            restored, first = whole(job.state()), back.step + 1
        for step in range(first, last + 1):
            job.train(step)
            if step in save:
                saver.save(step, replicated=job.state(), local={"rank": rank})
                saved[step] = whole(job.state())
                saver.wait_copied()
    failures = [event.reason for event in events if isinstance(event, CheckpointFailed)]
    return Leg(restored, saved, whole(job.state()), failures, read, kinds)


def arrays(state: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of a whole state by name."""
    found: dict[str, np.ndarray] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= arrays(value, f"{prefix}{key}/")
        elif isinstance(value, np.ndarray):
            found[f"{prefix}{key}"] = value
    return found


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
        back = saver.restore(1)
        whole_state = back.replicated["model"]
        found["without like"] = all(torch.equal(whole_state[name], t) for name, t in filled(1).items())
    with checkpointer(f"{url}/whole", rank) as saver, Counting() as read:
        back = saver.restore(1, like={"model": placed(mesh, 0)})
        found["whole"], found["whole right"] = dict(read), is_right(back.replicated["model"], mesh, 2)
    return found


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
    settings: dict[str, Any] = {"rank": dist.get_rank(group), "world_size": 2, "epoch": "x", "group": group}
    with Checkpointer(url, CONFIG, **settings, emit=lambda event: None) as saver:
        saver.save(1, replicated={"model": placed(mesh, 1)}, local={})
    dist.barrier(group)
    with Checkpointer(url, CONFIG, **settings, emit=lambda event: None) as saver:
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

    with checkpointer(url, rank) as saver:
        partial = DTensor.from_local(torch.ones(3), mesh, [Partial()])
        note("partial", save({"w": partial}))
        note("local", save({}, {"w": placed(mesh, 1)["rows"]}))
        note("submesh", save({"w": DTensor.from_local(torch.ones(3), pair, [Shard(0)], run_check=False)}))
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
    with checkpointer(f"{url}/mutated", rank) as saver:
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


def documented(rank: int, folder: str, code: str) -> list[int]:
    """The steps that an example in the docs takes."""
    os.chdir(folder)
    job, steps = Job(rank, Sharding((dist.get_world_size(),))), list[int]()

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        steps.append(step)
        result: torch.Tensor = model(torch.full((2, 10), 0.01 * step)).square().mean()
        return result

    exec(code, {"model": job.model, "optimizer": job.optimizer, "loss": loss, "attach": attach})
    return steps
