"""Lazy snapshots of a GPT and its AdamW: what a save costs a step, beside other ways to save; and what is found.

State: 1.2 G parameters and two moments in fp32, 14.5 GB. Steps are forward, backward and update under bf16 autocast.
Everything is written to shared memory, so that no disk is measured, but for one save where a disk is named.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from benchmarks.gpu.harness import Report, Settings, ms, one_rank, run, seconds, sync
from benchmarks.gpu.model import batches, build, loss_of
from outlast.checkpoint import CheckpointConfig, Checkpointer
from outlast.events import CheckpointSaved, Event

BLOCKED_AIM_S, TEN_AIM, EVERY_AIM = 0.010, 1.05, 1.15
SHM = Path("/dev/shm")


class Trainer:
    """A step, and the state to save."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model = build(settings)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        (self._batch,) = batches(settings, settings.size(8, 2), 1)
        self.before_update: Callable[[], object] = lambda: None

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss_of(self.model, self._batch, self.settings).backward()  # type: ignore[no-untyped-call]
        self.before_update()
        self.optimizer.step()

    def timed(self, after: Callable[[int], object], count: int) -> list[float]:
        """Seconds of each of ``count`` steps with what comes after it; the device is waited for in the last alone."""
        found, device = [], self.settings.device
        sync(device)
        for number in range(1, count + 1):
            began = time.perf_counter()
            self.step()
            after(number)
            sync(device)
            found.append(time.perf_counter() - began)
        return found

    def state(self) -> dict[str, Any]:
        """By parameter name."""
        names: dict[torch.Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        moments = {names[p]: dict(slots) for p, slots in self.optimizer.state.items()}
        return {"model": dict(self.model.named_parameters()), "optimizer": moments}

    def tensors(self) -> dict[str, Tensor]:
        """All that is saved, by one name each."""
        state = self.state()
        found = {f"model/{name}": tensor.detach() for name, tensor in state["model"].items()}
        for name, slots in state["optimizer"].items():
            found |= {f"optimizer/{name}/{slot}": tensor for slot, tensor in slots.items()}
        return found


class Saver:
    """A checkpointer, and what it said.

    Args:
        url: where to.
        config: how.
    """

    def __init__(self, url: Path, config: CheckpointConfig) -> None:
        self.events: list[Event] = []
        self.called_s: list[float] = []
        self.waited_s: list[float] = []
        self.checkpointer = Checkpointer(
            url, config, rank=0, world_size=1, attempt_id="snapshot", on_event=self.events.append
        )

    def save(self, trainer: Trainer, number: int, durable: bool = True) -> None:
        began = time.perf_counter()
        self.checkpointer.save(number, replicated=trainer.state(), local={}, durable=durable)
        self.called_s.append(time.perf_counter() - began)

    def wait(self) -> None:
        self.waited_s.append(self.checkpointer.wait_copied())

    def settle(self) -> None:
        """Wait until nothing is on its way to storage."""
        self.checkpointer.wait_copied()
        while self.checkpointer.running:
            time.sleep(0.02)

    def failures(self) -> list[str]:
        return [str(event) for event in self.events if "Failed" in type(event).__name__][:2]

    def durable_s(self) -> list[float]:
        return [event.durable_s for event in self.events if isinstance(event, CheckpointSaved)]


def free_GB() -> float:  # noqa: N802
    """Of the host's memory."""
    return float(psutil.virtual_memory().available) / 1e9


def pinned_rate(settings: Settings) -> float:
    """Bytes a second of a copy into page-locked memory."""
    nbytes = settings.size(2 << 30, 1 << 20)
    source = torch.ones(nbytes, dtype=torch.uint8, device=settings.device)
    target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=settings.cuda)
    return nbytes / min(seconds(lambda: target.copy_(source, non_blocking=True), settings.device) for _ in range(4))


def ours(
    report: Report, trainer: Trainer, folder: Path, none_s: list[float], rate: float, *, memory: bool, every: int
) -> None:
    """outlast, to storage or to memory alone."""
    settings = trainer.settings
    nbytes = sum(tensor.nbytes for tensor in trainer.tensors().values())
    before = free_GB()
    config = CheckpointConfig(keep_last=1, memory_every_steps=int(memory), memory_keep_last=1, io_threads=8)
    saver = Saver(folder / f"ours-{memory}-{every}", config)
    trainer.before_update = saver.wait
    try:
        first = trainer.timed(lambda number: saver.save(trainer, 1, durable=not memory), 1)
        first += trainer.timed(lambda number: None, 1)
        saver.settle()
        if memory:  # the second slot is made meanwhile
            saver.save(trainer, 2, durable=False)
            saver.checkpointer.wait_copied()
            time.sleep(settings.size(2, 0))
        saver.called_s.clear()
        saver.waited_s.clear()
        used = before - free_GB()
        count = 10 if every > 1 else 6
        times = trainer.timed(
            lambda n: saver.save(trainer, 10 + n, durable=not memory) if n % every == 1 % every else None, count
        )
        called, waited = saver.called_s, saver.waited_s
        blocked = [one + other for one, other in zip(called, waited[1:] if every == 1 else waited[1:2], strict=False)]
        ratio = statistics.mean(times) / statistics.median(none_s)
        fits = nbytes / rate < statistics.median(none_s)
        aim = TEN_AIM if every > 1 else EVERY_AIM
        reached = max(called) <= BLOCKED_AIM_S and (ratio <= aim or not fits) and not saver.failures()
        report.add(
            f"outlast to {'memory' if memory else 'storage'}, every {every} steps",
            settings.aim(reached),
            step_x_none=ratio,
            save_call_ms=[1e3 * one for one in called],
            wait_before_update_ms=[1e3 * one for one in waited],
            blocked_ms=[1e3 * one for one in blocked],
            copy_fits_a_step=fits,
            first_two_steps_ms=[1e3 * one for one in first],
            durable_s=saver.durable_s(),
            host_memory_GB=used,
            state_GB=nbytes / 1e9,
            failures=saver.failures(),
        )
        copy_rate(report, trainer, saver, rate, nbytes, durable=not memory)
    finally:
        trainer.before_update = lambda: None
        saver.checkpointer.abort() if memory else saver.checkpointer.close()
        if not memory:
            restored(report, trainer, folder / f"ours-{memory}-{every}")
        shutil.rmtree(folder / f"ours-{memory}-{every}", ignore_errors=True)


def copy_rate(report: Report, trainer: Trainer, saver: Saver, rate: float, nbytes: int, *, durable: bool) -> None:
    """How fast a snapshot is copied when nothing else runs."""
    saver.settle()
    sync(trainer.settings.device)
    began = time.perf_counter()
    saver.save(trainer, 100, durable=durable)
    saver.checkpointer.wait_copied()
    taken = time.perf_counter() - began
    report.add("rate of the copy", None, GB_a_s=nbytes / taken / 1e9, of_pinned=nbytes / taken / rate, seconds=taken)


def restored(report: Report, trainer: Trainer, folder: Path) -> None:
    """The newest save, back into other tensors, against what they were."""
    held = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    with torch.no_grad():
        for tensor in trainer.tensors().values():
            tensor.fill_(0.5)
    began = time.perf_counter()
    with Checkpointer(
        folder, CheckpointConfig(io_threads=8), rank=0, world_size=1, attempt_id="restore", on_event=lambda event: None
    ) as one:
        found = one.restore("auto", into=trainer.state())
    sync(trainer.settings.device)
    taken = time.perf_counter() - began
    wrong = [name for name, tensor in trainer.tensors().items() if not torch.equal(tensor, held[name])]
    report.add(
        "restored bit for bit",
        found is not None and not wrong,
        step=found.step if found else None,
        wrong=wrong[:3],
        seconds=taken,
    )


def torch_save(report: Report, trainer: Trainer, folder: Path, none_s: list[float]) -> None:
    """The plain way: everything waits."""
    folder.mkdir(exist_ok=True)
    sync(trainer.settings.device)
    began = time.perf_counter()
    torch.save(trainer.tensors(), folder / "state.pt")
    report.add("torch.save", None, blocked_ms=1e3 * (time.perf_counter() - began))
    shutil.rmtree(folder)


def dcp_async(report: Report, trainer: Trainer, folder: Path, none_s: list[float], *, pinned: bool) -> None:
    """PyTorch's asynchronous save: once to set it up, once to measure."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    stager = None
    if pinned:
        stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=trainer.settings.cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=trainer.settings.cuda,
            )
        )
    called = []
    for number in range(2):
        sync(trainer.settings.device)
        began = time.perf_counter()
        answer: Any = dcp.async_save(  # type: ignore[attr-defined]
            trainer.tensors(), checkpoint_id=folder / str(number), async_stager=stager
        )
        called.append(time.perf_counter() - began)
        done = getattr(answer, "upload_completion", answer)
        if number:
            steps = trainer.timed(lambda n: None, 3)
        done.result()
        shutil.rmtree(folder / str(number), ignore_errors=True)
    if stager is not None:
        stager.close()
    report.add(
        f"DCP async, {'pinned staging' if pinned else 'as it comes'}",
        None,
        blocked_ms=[1e3 * one for one in called],
        steps_beside_x_none=statistics.mean(steps) / statistics.median(none_s),
        host_memory_free_GB=free_GB(),
    )


def section(report: Report, settings: Settings) -> None:
    """What it costs, beside other ways."""
    one_rank(settings, "cpu:gloo,cuda:nccl" if settings.cuda else "gloo")
    rate = pinned_rate(settings)
    report.add("copy into page-locked memory", None, GB_a_s=rate / 1e9)
    trainer = Trainer(settings)
    began = time.perf_counter()
    trainer.timed(lambda number: None, 2)
    report.add("first two steps, compilation in them", None, seconds=time.perf_counter() - began)
    none_s = trainer.timed(lambda number: None, 6)
    report.add("no saves", None, step_ms=ms(none_s), range_ms=[1e3 * min(none_s), 1e3 * max(none_s)])
    with tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None) as name:
        folder = Path(name)
        for what, job in (
            (
                "outlast to storage, every 10 steps",
                lambda: ours(report, trainer, folder, none_s, rate, memory=False, every=10),
            ),
            (
                "outlast to memory, every step",
                lambda: ours(report, trainer, folder, none_s, rate, memory=True, every=1),
            ),
            ("torch.save", lambda: torch_save(report, trainer, folder / "torch", none_s)),
            ("DCP async, pinned staging", lambda: dcp_async(report, trainer, folder, none_s, pinned=True)),
            ("DCP async, as it comes", lambda: dcp_async(report, trainer, folder, none_s, pinned=False)),
        ):
            report.attempt(what, job)
            gc.collect()
        again = trainer.timed(lambda number: None, 3)
        report.add("no saves, once more", None, step_ms=ms(again))


if __name__ == "__main__":
    run("snapshot", section)
