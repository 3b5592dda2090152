"""What the recorder says of collectives on a GPU, beside the profiler and NCCL's own clock; and what it costs.

One rank: NCCL then copies, so that the times are those of copies, and overheads show.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.harness import Report, Settings, interleaved, ms, one_rank, ratios, run, sync
from outlast.comm import Communicator
from outlast.comm.transport.stream import DeviceStream
from outlast.diagnostics import Recorder
from outlast.diagnostics.live import read_ring

COUNT = 50


def gathered(communicator: Communicator, payload: torch.Tensor, out: torch.Tensor) -> None:
    """A collective as the communicator issues those of several ranks."""
    communicator._issue(
        "all_gather", payload.nbytes, 0, "payload", payload.device,
        lambda: dist.all_gather_into_tensor(out, payload, group=communicator.group, async_op=True),
    )  # fmt: skip


def durations(report: Report, settings: Settings, folder: Path, *, busy: bool) -> None:
    """Fifty collectives, each behind work on the stream that computes: the recorder's times are the collectives' own.

    ``busy``: the next one's work is queued meanwhile. A collective that is a copy then waits for the processors that
    the work has taken; the profiler counts from when it got them, the recorder from when it could have begun.
    """
    recorder = Recorder(folder / "ring", rank=0)
    lane = DeviceStream(settings.device)
    communicator = Communicator(observer=recorder, stream=lane.work)
    payload = torch.ones(settings.size(256 << 20, 1 << 16), dtype=torch.uint8, device=settings.device)
    out = torch.empty_like(payload)
    side = settings.size(4096, 64)
    a = torch.randn((side, side), device=settings.device)

    def step() -> None:
        jobs = []
        for _ in range(COUNT):
            torch.mm(a, a)
            ready = lane.mark()

            def job(ready: Any = ready) -> None:
                with lane.work(ready):
                    gathered(communicator, payload, out)

            jobs.append(communicator.submit(job))
            if not busy:
                jobs[-1].result()
        for one in jobs:
            one.result()

    step()
    sync(settings.device)
    activities = [torch.profiler.ProfilerActivity.CUDA if settings.cuda else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        sync(settings.device)
    told = [
        r.completed_s - r.entered_s for r in read_ring(folder / "ring").records[-COUNT:] if r.completed_s is not None
    ]
    names = ("nccl", "memcpy dtod")
    events: Any = profile.events()
    kernels = [event for event in events if any(name in event.name.lower() for name in names)]
    seen = [getattr(event, "device_time_total", 0.0) / 1e6 for event in kernels]
    seen = sorted(seen)[-COUNT:]
    figures: dict[str, Any] = {"recorder_ms": ms(told), "recorder_range_ms": [1e3 * min(told), 1e3 * max(told)]}
    passed: bool | None = None
    if settings.cuda and seen:
        figures |= {
            "profiler_ms": ms(seen),
            "collectives_in_profile": len(seen),
            "kinds": sorted({e.name[:40] for e in kernels})[:3],
        }
        off = statistics.median(told) - statistics.median(seen)
        figures["recorder_more_us"] = 1e6 * off
        passed = None if busy else len(told) == COUNT and len(seen) == COUNT and -2e-5 <= off <= 2e-4
    report.add(f"50 collectives, recorder and profiler, device {'busy' if busy else 'idle'}", passed, **figures)
    communicator.close()
    recorder.close(unlink=True)


def own_clock(report: Report, settings: Settings) -> None:
    """The same collective by NCCL's own events, which PyTorch reads where timing is on."""
    if not settings.cuda:
        return
    payload = torch.ones(256 << 20, dtype=torch.uint8, device=settings.device)
    out = torch.empty_like(payload)
    found = []
    for _ in range(10):
        work: Any = dist.all_gather_into_tensor(out, payload, async_op=True)
        work.wait()
        sync(settings.device)
        found.append(work._get_duration())
    report.add("the same by NCCL's own events", None, ms=statistics.median(found))


def cost(report: Report, settings: Settings, folder: Path) -> None:
    """A step with fifty collectives with the recorder and without; and the recorder alone."""
    recorder = Recorder(folder / "ring2", rank=0)
    lane = DeviceStream(settings.device)
    made = {
        "recorded": Communicator(observer=recorder, stream=lane.work),
        "not": Communicator(stream=lane.work),
    }
    payload = torch.ones(settings.size(1 << 20, 1 << 10), dtype=torch.uint8, device=settings.device)
    out = torch.empty_like(payload)

    def job(communicator: Communicator) -> None:
        for _ in range(COUNT):
            gathered(communicator, payload, out)

    def step(communicator: Communicator) -> None:
        began = time.perf_counter()
        communicator.submit(lambda: job(communicator)).result()
        taken[communicator].append(time.perf_counter() - began)

    taken: dict[Communicator, list[float]] = {communicator: [] for communicator in made.values()}
    interleaved({name: (lambda c=c: step(c)) for name, c in made.items()}, torch.device("cpu"), rounds=20)  # type: ignore[misc]
    middle, least, most = ratios(taken[made["recorded"]], taken[made["not"]])
    began = time.perf_counter()
    for _ in range(1000):
        recorder.complete(recorder.enter("all_gather", 1, "payload"))
    alone_us = 1e3 * (time.perf_counter() - began)
    report.add(
        "a step of 50 collectives of 1 MB, recorded", None,
        step_ms=ms(taken[made["recorded"]]), x_not_recorded=[middle, least, most], recorder_alone_us=alone_us,
    )  # fmt: skip
    for communicator in made.values():
        communicator.close()
    recorder.close(unlink=True)


def section(report: Report, settings: Settings) -> None:
    """Times, then costs."""
    os.environ["TORCH_NCCL_ENABLE_TIMING"] = "1"
    one_rank(settings)
    with tempfile.TemporaryDirectory() as name:
        for busy in (False, True):
            report.attempt("durations", partial(durations, report, settings, Path(name), busy=busy))
        report.attempt("NCCL's own events", lambda: own_clock(report, settings))
        report.attempt("cost", lambda: cost(report, settings, Path(name)))


if __name__ == "__main__":
    run("recorder", section)
