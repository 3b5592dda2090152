"""How much of the card training uses, and what outlast adds: recorder, heartbeat, snapshots, compression.

A plain PyTorch loop and outlast's engine take turns, a few steps each, in one process, each with a model of its own.
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

import torch

from benchmarks.gpu.harness import Report, Settings, one_rank, run, sync
from benchmarks.gpu.model import Batch, batches, build, loss_of, matmul_flops_per_s
from outlast.checkpoint import CheckpointConfig, Checkpointer
from outlast.comm import CommConfig
from outlast.diagnostics import Heartbeat, Recorder
from outlast.trainer import Config, DDPEngine
from outlast.trainer.config import OptimConfig, TrainerConfig

MFU_AIM, SLOWER_AIM = 0.50, 1.03
SHM = Path("/dev/shm")


class Plain:
    """What one writes without outlast: autocast, accumulation, clipping, fused AdamW."""

    def __init__(self, model: torch.nn.Module, settings: Settings) -> None:
        self._model = model
        self._settings = settings
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def step(self, number: int, parts: list[Batch]) -> None:
        self._optimizer.zero_grad()
        total = torch.zeros((), device=self._settings.device)
        for batch in parts:
            loss = loss_of(self._model, batch, self._settings) / len(parts)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        float(total)

    def clear(self) -> None:
        """Let go of the gradients."""
        self._optimizer.zero_grad()


class Ours:
    """outlast's engine, with all that the trainer's loop does around it.

    Args:
        model: of the same size as the plain loop's.
        settings: of the run.
        folder: for ring and heartbeat.
        comm: how gradients are averaged.
        save_every: steps; 0: never.
    """

    def __init__(
        self, model: torch.nn.Module, settings: Settings, folder: Path, comm: CommConfig, save_every: int
    ) -> None:
        config = Config(
            optim=OptimConfig(lr=1e-4, warmup_steps=0),
            trainer=TrainerConfig(precision="bf16", steps=1000),
            comm=comm,
        )
        self._recorder = Recorder(folder / "ring", rank=0)
        self._heartbeat = Heartbeat(folder / "heartbeat", rank=0)
        self._engine = DDPEngine(model, config, settings.device, observer=self._recorder)
        self._save_every = save_every
        self.waited_s: list[float] = []
        self.saved_s: list[float] = []
        self.failures: list[str] = []
        self._checkpointer = Checkpointer(
            str(folder / "checkpoints"),
            CheckpointConfig(keep_last=1),
            rank=0,
            world_size=1,
            attempt_id="speed",
            on_event=lambda event: self.failures.append(str(event)) if "Failed" in type(event).__name__ else None,
        )
        self._checkpointer.watch(model)

    def step(self, number: int, parts: list[Batch]) -> None:
        self._recorder.step = number
        self._heartbeat.beat("step", number)
        self._engine.forward_backward(number, parts)
        self.waited_s.append(self._checkpointer.wait_copied())
        self._engine.update(number)
        if self._save_every and number % self._save_every == 0:
            began = time.perf_counter()
            state = self._engine.state()
            self._checkpointer.save(number, replicated=state.replicated, local=state.local, eager=state.eager)
            self.saved_s.append(time.perf_counter() - began)

    def close(self) -> None:
        self._checkpointer.abort()
        self._engine.close()
        self._recorder.close(unlink=True)
        self._heartbeat.close(unlink=True)


def timed(
    step: Callable[[int, list[Batch]], None], first: int, count: int, parts: list[Batch], settings: Settings
) -> list[float]:
    """Seconds of each of ``count`` steps."""
    found = []
    for number in range(first, first + count):
        sync(settings.device)
        began = time.perf_counter()
        step(number, parts)
        sync(settings.device)
        found.append(time.perf_counter() - began)
    return found


def section(report: Report, settings: Settings) -> None:
    """Rate of a product; the plain loop and ours in turns; ours with less on, to tell what costs."""
    one_rank(settings)
    rate = matmul_flops_per_s(settings)
    report.add("product of 8192 × 8192 bf16", None, TFLOP_a_s=rate / 1e12)
    model = build(settings)
    sequences, accumulate = settings.size(4, 2), settings.size(8, 2)
    parts = batches(settings, sequences, accumulate)
    tokens = sum(batch[0].numel() for batch in parts)
    flops = tokens * model.flops_per_token()
    plain = Plain(model, settings)
    began = time.perf_counter()
    timed(plain.step, 1, 2, parts, settings)
    numel = sum(p.numel() for p in model.parameters())
    report.add(
        "first two steps, compilation in them", None, seconds=time.perf_counter() - began, parameters_M=numel / 1e6
    )

    def use(seconds: float) -> dict[str, Any]:
        return {
            "step_ms": 1e3 * seconds,
            "TFLOP_a_s": flops / seconds / 1e12,
            "share_of_product": flops / seconds / rate,
        }

    with tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None) as name:
        variants = {
            "dense": (CommConfig(compressor="dense"), 0),
            "compression, a save every 10 steps": (CommConfig(), 10),
        }
        for label, (comm, every) in variants.items():

            def compare(label: str = label, comm: CommConfig = comm, every: int = every) -> None:
                folder = Path(name) / str(every)
                folder.mkdir()
                # A model of its own: the reducer of updates refuses that AdamW steps its parameters.
                ours = Ours(build(settings), settings, folder, comm, every)
                try:
                    timed(ours.step, 1, 2, parts, settings)
                    count, rounds = (5, 2) if every else (3, 1)
                    theirs_s: list[float] = []
                    ours_s: list[float] = []
                    for number in range(rounds):
                        theirs_s += timed(plain.step, 1, 2, parts, settings)
                        ours_s += timed(ours.step, 6 + number * count, count, parts, settings)
                    theirs_s += timed(plain.step, 1, 2, parts, settings)
                finally:
                    ours.close()
                    plain.clear()
                    shutil.rmtree(folder, ignore_errors=True)
                base = statistics.median(theirs_s)
                # All steps count, those that save too: one in ten does.
                slower = statistics.mean(ours_s) / base
                if not every:
                    share = use(base)["share_of_product"]
                    report.add(
                        "plain loop",
                        settings.aim(share >= MFU_AIM),
                        **use(base),
                        range_ms=[1e3 * min(theirs_s), 1e3 * max(theirs_s)],
                    )
                share = use(statistics.mean(ours_s))["share_of_product"]
                reached = share >= MFU_AIM and slower <= SLOWER_AIM and not ours.failures
                report.add(
                    f"outlast, {label}",
                    settings.aim(reached),
                    **use(statistics.mean(ours_s)),
                    times_plain=slower,
                    each_ms=[1e3 * one for one in ours_s],
                    plain_ms=[1e3 * one for one in theirs_s],
                    save_call_ms=[1e3 * one for one in ours.saved_s],
                    waited_ms=[1e3 * one for one in ours.waited_s],
                    failures=ours.failures[:2],
                    memory_GB=torch.cuda.max_memory_allocated() / 1e9 if settings.cuda else 0.0,
                )

            report.attempt(f"outlast, {label}", compare)
            gc.collect()  # DDP is part of a circle
            if settings.cuda:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    run("speed", section)
