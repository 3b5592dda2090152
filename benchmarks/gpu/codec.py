"""How fast compression is on the device: encode and decode beside a copy of the same tensor, and beside a product."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from benchmarks.gpu.harness import Report, Settings, interleaved, ms, one_rank, ratios, run, seconds, sync
from outlast.comm.compressors import make_compressor
from outlast.comm.feedback import EF14

COMPRESSORS: dict[str, dict[str, Any]] = {
    "topk 1 % int8": {"name": "topk", "density": 0.01, "values": "int8"},
    "topk 5 % int8": {"name": "topk", "density": 0.05, "values": "int8"},
    "sign": {"name": "sign"},
    "int8": {"name": "int8"},
    "int4": {"name": "int4"},
    "low rank 4": {"name": "lowrank", "rank": 4},
}
ENCODE_AIM, DECODE_AIM, OVERLAP_AIM = 4.0, 2.0, 1.10


class Bucket:
    """One gradient as DDP's hooks see it."""

    def __init__(self, gradient: Tensor) -> None:
        self._gradient = gradient

    def buffer(self) -> Tensor:
        return self._gradient.view(-1)

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True

    def gradients(self) -> list[Tensor]:
        return [self._gradient]

    def set_buffer(self, buffer: Tensor) -> None:
        self._gradient = buffer.view(self._gradient.shape)


def peers(gradient: Tensor) -> dict[str, Callable[[], object]]:
    """PyTorch's own hooks, one rank; each leaves the gradient averaged, so both ways are in it."""
    state = PowerSGDState(dist.group.WORLD, matrix_approximation_rank=4, start_powerSGD_iter=2, warm_start=True)
    bucket: Any = Bucket(gradient)

    def power() -> None:
        state.iter = 10
        powerSGD_hook(state, bucket).wait()

    def half() -> None:
        bf16_compress_hook(dist.group.WORLD, Bucket(gradient)).wait()  # type: ignore[arg-type]

    return {"PowerSGD 4, step": power, "bf16 hook, step": half}


def speed(report: Report, settings: Settings, rows: int) -> None:
    """Of one square matrix."""
    numel = rows * rows
    g = torch.randn((rows, rows), device=settings.device).pow_(3)
    out = torch.empty_like(g)
    jobs: dict[str, Callable[[], object]] = {"copy": lambda: out.copy_(g)}
    holds: dict[str, Any] = {}
    for label, kind in COMPRESSORS.items():
        compressor = make_compressor(**kind)
        feedback, payload = (
            EF14(compressor),
            torch.empty(compressor.nbytes((rows, rows)), dtype=torch.uint8, device=settings.device),
        )
        state = feedback.start(g)
        holds[label] = payload.numel()

        def encode(feedback: EF14 = feedback, state: dict[str, Tensor] = state, payload: Tensor = payload) -> None:
            feedback.encode(state, g, payload)

        def decode(feedback: EF14 = feedback, payload: Tensor = payload) -> None:
            feedback.compressor.add_to(out, payload, 0.25)

        jobs = {"copy": jobs["copy"], f"{label} encode": encode, f"{label} decode": decode}
        times = 1 if numel > 5e8 else 3
        found = interleaved(jobs, settings.device, rounds=3 if settings.tiny else 5, times=times)
        sync(settings.device)
        row: dict[str, Any] = {"copy_ms": ms(found["copy"]), "bytes_an_entry": payload.numel() / numel}
        passed = True
        for part, aim in (("encode", ENCODE_AIM), ("decode", DECODE_AIM)):
            middle, least, most = ratios(found[f"{label} {part}"], found["copy"])
            row |= {f"{part}_ms": ms(found[f"{label} {part}"]), f"{part}_x_copy": [middle, least, most]}
            passed = passed and middle <= aim
        report.add(f"{label}, {numel / 1e6:.0f} M", settings.aim(passed), **row)
        del state, payload, encode, decode
        jobs = {"copy": jobs["copy"]}
    if settings.cuda or settings.tiny:
        copied = g.clone()
        for label, job in peers(copied).items():
            found = interleaved({"copy": jobs["copy"], label: job}, settings.device, rounds=3 if settings.tiny else 5)
            middle, least, most = ratios(found[label], found["copy"])
            report.add(
                f"{label}, {numel / 1e6:.0f} M", None, step_ms=ms(found[label]), step_x_copy=[middle, least, most]
            )


def overlap(report: Report, settings: Settings) -> None:
    """A product of matrices with the codec at work on another stream."""
    side = settings.size(8192, 64)
    kind = torch.bfloat16 if settings.cuda else torch.float32
    a, b = (torch.randn((side, side), device=settings.device, dtype=kind) for _ in range(2))
    g = torch.randn((settings.size(8192, 64),) * 2, device=settings.device)
    out, times = torch.empty_like(g), settings.size(20, 1)
    stream = torch.cuda.Stream(settings.device) if settings.cuda else None  # type: ignore[no-untyped-call]

    def products() -> None:
        for _ in range(times):
            torch.mm(a, b)

    for label in ("topk 1 % int8", "int8"):
        feedback = EF14(make_compressor(**COMPRESSORS[label]))
        state = feedback.start(g)
        payload = feedback.encode(state, g)

        def beside(feedback: EF14 = feedback, state: dict[str, Tensor] = state, payload: Tensor = payload) -> None:
            feedback.encode(state, g, payload)
            feedback.compressor.add_to(out, payload, 0.25)

        beside()
        alone, together = [], []
        for number in range(4):
            sync(settings.device)
            alone.append(seconds(products, settings.device))
            sync(settings.device)
            if stream is None:
                together.append(seconds(products, settings.device))
            else:
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                start.record()
                products()
                stop.record()
                with torch.cuda.stream(stream):
                    beside()
                stop.synchronize()
                together.append(float(start.elapsed_time(stop)) / 1e3)
                stream.synchronize()
            if not number:
                alone, together = [], []
        middle, least, most = ratios(together, alone)
        step = seconds(beside, settings.device)
        report.add(
            f"a product of {1e3 * statistics.median(alone):.0f} ms beside one encode and decode "
            f"of {g.numel() / 1e6:.0f} M, {label}",
            settings.aim(middle <= OVERLAP_AIM),
            product_x_alone=[middle, least, most],
            codec_alone_ms=1e3 * step,
        )


def _copy_rate(report: Report, settings: Settings) -> None:
    """What everything else is compared with: a copy on the device."""
    x = torch.empty(settings.size(1 << 30, 1 << 16), device=settings.device).normal_()
    y = torch.empty_like(x)
    taken = interleaved({"copy": partial(y.copy_, x)}, settings.device, rounds=5)["copy"]
    report.add("a copy", None, GB=x.nbytes / 1e9, GB_read_and_written_a_s=2 * x.nbytes / 1e9 / statistics.median(taken))


def section(report: Report, settings: Settings) -> None:
    """Small to large."""
    one_rank(settings)
    _copy_rate(report, settings)
    for rows in (64, 96) if settings.tiny else (3162, 10_000, 32_768):
        report.attempt(f"{rows * rows / 1e6:.0f} M entries", partial(speed, report, settings, rows))
        if settings.cuda:
            torch.cuda.empty_cache()
    report.attempt("beside a product", lambda: overlap(report, settings))


if __name__ == "__main__":
    run("codec", section)
