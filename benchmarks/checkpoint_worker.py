"""One rank of :mod:`benchmarks.checkpoint`: reads orders as JSON lines from stdin, and answers on stdout."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp
from torch.nn.parallel import DistributedDataParallel

from outlast.checkpoint import CheckpointConfig, Checkpointer, attach
from outlast.checkpoint.tiers.folders import memory_folder
from outlast.events import CheckpointFailed, CheckpointSaved, Event

WIDTH = 2048
BATCH = 64
_BLOCK_BYTES = 16 << 20

State = dict[str, Any]


@dataclass(slots=True)
class Trainer:
    """A perceptron under DDP with AdamW, whose parameters and two moments take ``state_mb``."""

    ddp: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    batch: torch.Tensor

    def forward_backward(self) -> None:
        self.optimizer.zero_grad()
        self.ddp(self.batch).square().mean().backward()

    def state(self) -> State:
        names = {parameter: name for name, parameter in self.ddp.module.named_parameters()}
        return {
            "model": {name: parameter.detach() for parameter, name in names.items()},
            "optimizer": {names[p]: dict(slots) for p, slots in self.optimizer.state.items()},
        }


def build(state_mb: float) -> Trainer:
    """Layers of WIDTH x WIDTH, enough for the state's size; takes two steps, so that all of the state exists."""
    torch.manual_seed(0)
    layers = max(1, round(state_mb * 1e6 / (3 * 4 * WIDTH * (WIDTH + 1))))
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(layers)])
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    trainer = Trainer(ddp, optimizer, torch.randn(BATCH, WIDTH))
    for _ in range(2):
        trainer.forward_backward()
        optimizer.step()
    return trainer


@dataclass
class Method(ABC):
    """A way to save. ``blocked_s`` has the time each save blocked training, ``durable_s`` the time it took."""

    warm_ups: ClassVar[int] = 1
    folder: Path
    blocked_s: list[float] = field(default_factory=list)
    durable_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:  # noqa: B027
        """Prepare."""

    @abstractmethod
    def save(self, step: int, state: State) -> None:
        """Start a save."""

    def watch(self, trainer: Trainer) -> None:  # noqa: B027
        """Called with the training state before training."""

    def before_update(self) -> None:  # noqa: B027
        """Called before the state changes."""

    def settle(self) -> None:  # noqa: B027
        """Wait until every save is durable."""

    def drain(self) -> None:
        """Wait until every save is durable, and release resources."""
        self.settle()

    def forget(self) -> None:
        """Discard the figures of the saves so far."""
        self.blocked_s, self.durable_s = [], []

    def clean(self) -> None:  # noqa: B027
        """Remove everything outside the folder."""

    @abstractmethod
    def load(self, state: State) -> None:
        """Read the newest save back into ``state``."""

    def after_load(self) -> None:  # noqa: B027
        """Release what reading took; not timed."""

    def _begin(self, step: int) -> Path:
        """A new path, because removing an old save would count as training time."""
        self._newest = self.folder / f"step-{step}"
        return self._newest


class Nothing(Method):
    def save(self, step: int, state: State) -> None:
        return

    def load(self, state: State) -> None:
        return


class TorchSave(Method):
    """Rank 0 writes and syncs one file while the others wait."""

    def save(self, step: int, state: State) -> None:
        began = time.perf_counter()
        path = self._begin(step)
        if dist.get_rank() == 0:
            with path.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        dist.barrier()
        self.blocked_s.append(time.perf_counter() - began)
        self.durable_s.append(self.blocked_s[-1])

    def load(self, state: State) -> None:
        loaded = torch.load(self._newest, weights_only=True)
        for name, parameter in state["model"].items():
            parameter.copy_(loaded["model"][name])
            for slot, tensor in state["optimizer"][name].items():
                tensor.copy_(loaded["optimizer"][name][slot])


class DCP(Method):
    """torch.distributed.checkpoint with its defaults."""

    def save(self, step: int, state: State) -> None:
        began = time.perf_counter()
        save_dcp(state, checkpoint_id=self._begin(step))
        self.blocked_s.append(time.perf_counter() - began)
        self.durable_s.append(self.blocked_s[-1])

    def load(self, state: State) -> None:
        load_dcp(state, checkpoint_id=self._newest)


class DCPAsync(DCP):
    """The same in the background, on its own process group, since on training's the two would wait for each other. The
    staging copy blocks, and so does a save that starts before the previous one has finished."""

    kind = AsyncCheckpointerType.THREAD

    def __post_init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._future: Any = None
        self._noted = threading.Event()

    def save(self, step: int, state: State) -> None:
        began = time.perf_counter()
        self.settle()
        path = self._begin(step)
        future: Any = async_save(
            state, checkpoint_id=path, process_group=self._group, async_checkpointer_type=self.kind
        )
        self._future = future
        started = time.perf_counter()
        self.blocked_s.append(started - began)
        self._noted = noted = threading.Event()

        def note(_: object) -> None:
            self.durable_s.append(time.perf_counter() - began)
            noted.set()

        future.add_done_callback(note)

    def settle(self) -> None:
        if self._future is not None:
            self._future.result()
            self._noted.wait()  # whoever waits for a result may go on before its callbacks have run


class DCPProcess(DCPAsync):
    kind = AsyncCheckpointerType.PROCESS


class RawBeside(Method):
    """Not a checkpoint: writes as many bytes as the state has, always the same ones, with O_DIRECT while training goes
    on, without copies or checksums. Every method that writes during training costs at least this."""

    def __post_init__(self) -> None:
        self._block = _block()
        self._thread: threading.Thread | None = None

    def save(self, step: int, state: State) -> None:
        began = time.perf_counter()
        self.settle()
        path = self._begin(step)
        path.mkdir(exist_ok=True)  # the other rank may have been faster
        nbytes = sum(t.nbytes for part in (state["model"], *state["optimizer"].values()) for t in part.values())

        def write() -> None:
            _write_raw(path / f"raw-{dist.get_rank()}", self._block, nbytes // dist.get_world_size())
            self.durable_s.append(time.perf_counter() - began)

        self._thread = threading.Thread(target=write)
        self._thread.start()
        self.blocked_s.append(time.perf_counter() - began)

    def settle(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def load(self, state: State) -> None:
        return


class Outlast(Method):
    """outlast, to storage."""

    config = CheckpointConfig(keep_last=1)
    tier = "storage"

    def __post_init__(self) -> None:
        self._events: list[Event] = []
        self._checkpointer: Checkpointer = attach(self.folder, self.config, on_event=self._events.append)

        self._begun = 0

    def save(self, step: int, state: State) -> None:
        self._begun += 1
        self._checkpointer.save(step, replicated=state, durable=self.tier == "storage")

    def settle(self) -> None:
        while len(self._saved()) < self._begun:
            time.sleep(0.001)

    def forget(self) -> None:
        self._events.clear()
        self._begun = 0

    def watch(self, trainer: Trainer) -> None:
        self._checkpointer.watch(trainer.ddp)

    def before_update(self) -> None:
        self._checkpointer.wait_copied()

    def drain(self) -> None:
        self._checkpointer.close()
        self.blocked_s = [event.blocked_s for event in self._saved()]
        self.durable_s = [event.durable_s for event in self._saved()]

    def _saved(self) -> list[CheckpointSaved]:
        failed = [event.reason for event in list(self._events) if isinstance(event, CheckpointFailed)]
        if failed:
            raise RuntimeError(f"saves failed: {failed}")
        return [event for event in list(self._events) if isinstance(event, CheckpointSaved) and event.tier == self.tier]

    def load(self, state: State) -> None:
        self._reader = attach(self.folder, self.config)
        assert self._reader.restore("auto", into=state) is not None

    def after_load(self) -> None:
        self._reader.close()


class OutlastMemory(Outlast):
    """outlast, to memory that survives the processes, after every step."""

    config = CheckpointConfig(memory_every_steps=1)
    tier = "memory"
    warm_ups = config.memory_keep_last + 1  # each of these reserves its memory

    def clean(self) -> None:
        shutil.rmtree(memory_folder(str(self.folder)), ignore_errors=True)


METHODS: dict[str, type[Method]] = {
    "none": Nothing,
    "torch.save": TorchSave,
    "dcp": DCP,
    "dcp-async-thread": DCPAsync,
    "dcp-async-process": DCPProcess,
    "raw-beside": RawBeside,
    "outlast": Outlast,
    "outlast-memory": OutlastMemory,
}


def run(trainer: Trainer, method: Method, steps: int, every: int) -> dict[str, Any]:
    """Train, and save at an interval; seconds per step include the time that saves block.

    A save or some before that are not counted: what a method does once, it has done then.
    """
    state = trainer.state()
    method.watch(trainer)
    for number in range(method.warm_ups):
        trainer.forward_backward()
        method.save(number, state)
        trainer.forward_backward()
        method.before_update()
        trainer.optimizer.step()
    method.settle()
    method.forget()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts anew
    before_bytes = psutil.Process().memory_info().rss
    dist.barrier()
    began = time.perf_counter()
    for step in range(1, steps + 1):
        trainer.forward_backward()
        method.before_update()
        trainer.optimizer.step()
        if step % every == 0:
            method.save(step + method.warm_ups - 1, state)
    # The next step would wait for the copy of the last save.
    trainer.forward_backward()
    method.before_update()
    dist.barrier()
    step_s = (time.perf_counter() - began) / (steps + 1)
    method.drain()
    dist.barrier()
    return {
        "step_s": step_s,
        "blocked_s": method.blocked_s,
        "durable_s": method.durable_s,
        "host_bytes": _peak_bytes() - before_bytes,
    }


def load(trainer: Trainer, method: Method) -> float:
    """Seconds to read back with a cold page cache."""
    for path in method.folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
    state = trainer.state()
    dist.barrier()
    began = time.perf_counter()
    with torch.no_grad():
        method.load(state)
    dist.barrier()
    took_s = time.perf_counter() - began
    method.after_load()
    return took_s


def raw(folder: Path, nbytes: int) -> float:
    """Seconds until this rank's part of the bytes is on the disk, written with O_DIRECT and without checksums."""
    part = nbytes // dist.get_world_size() // _BLOCK_BYTES * _BLOCK_BYTES
    block, path = _block(), folder / f"raw-{dist.get_rank()}"
    dist.barrier()
    began = time.perf_counter()
    _write_raw(path, block, part)
    dist.barrier()
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def _block() -> memoryview:
    """Page-aligned random bytes."""
    buffer = torch.randint(0, 256, (_BLOCK_BYTES + 4096,), dtype=torch.uint8)
    start = -buffer.data_ptr() % 4096
    return buffer[start : start + _BLOCK_BYTES].numpy().data


def _write_raw(path: Path, block: memoryview, nbytes: int) -> None:
    """Write the block repeatedly, with O_DIRECT, until there are this many bytes."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o644)
    try:
        os.posix_fallocate(fd, 0, nbytes)
        for at in range(0, nbytes, len(block)):
            os.pwrite(fd, block, at)
        os.fsync(fd)
    finally:
        os.close(fd)


def _peak_bytes() -> int:
    """Peak memory of this process plus the current memory of its children."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return peak + sum(int(child.memory_info().rss) for child in psutil.Process().children(recursive=True))


def main() -> None:
    """``checkpoint_worker FOLDER STATE_MB``: join the process group, and serve orders until stdin ends."""
    folder, state_mb = Path(sys.argv[1]), float(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    trainer = build(state_mb)
    nbytes = sum(p.numel() * p.element_size() for p in trainer.ddp.parameters()) * 3
    for line in sys.stdin:
        order = json.loads(line)
        where = folder / str(order["number"])
        answer: dict[str, Any]
        if order["do"] == "raw":
            where.mkdir(parents=True, exist_ok=True)
            answer = {"durable_s": raw(where, nbytes)}
        else:
            where.mkdir(parents=True, exist_ok=True)
            method = METHODS[order["method"]](where)
            answer = run(trainer, method, order["steps"], order["every"])
            answer["load_s"] = load(trainer, method)
            method.clean()
        print(json.dumps(answer), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
