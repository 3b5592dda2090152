"""What the sections share: a report that is written as it grows, clocks that know streams, settings of a run."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Settings:
    """How a section runs."""

    out: Path
    seconds: float
    """When these are over, a section leaves out what is left."""
    device: torch.device
    tiny: bool
    """Sizes of a trial, on whatever machine."""

    @property
    def cuda(self) -> bool:
        """Whether there are streams, and figures mean something."""
        return self.device.type == "cuda"

    def aim(self, reached: bool) -> bool | None:
        """Whether an aim of speed is reached; unknown in a trial."""
        return None if self.tiny else reached

    def size(self, real: int, tiny: int) -> int:
        """One of the two."""
        return tiny if self.tiny else real


class Report:
    """The checks of one section; the file is written anew with each.

    Args:
        name: of the section.
        settings: where the file goes, and how long the section has.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        self._name = name
        self._path = settings.out / f"{name}.json"
        self._until = time.monotonic() + settings.seconds
        self._checks: list[dict[str, Any]] = []
        self._began = time.monotonic()
        self._write()

    def add(self, what: str, passed: bool | None, **figures: Any) -> None:
        """One line: passed, failed, or (None) a figure without an aim."""
        self._checks.append({"what": what, "passed": passed, "figures": _plain(figures)})
        self._write()
        print(line(self._name, self._checks[-1]), flush=True)

    @property
    def late(self) -> bool:
        """Whether the section's time is over."""
        return time.monotonic() > self._until

    def attempt(self, what: str, job: Callable[[], object]) -> None:
        """A part whose error is one failed line, and no end of the section; left out when the time is over."""
        if self.late:
            self.add(what, None, left_out="the section's time was over")
            return
        try:
            job()
        except Exception as error:
            traceback.print_exc()
            self.add(what, False, error=f"{type(error).__name__}: {error}"[:600])

    def _write(self) -> None:
        seconds = round(time.monotonic() - self._began, 1)
        text = json.dumps({"section": self._name, "seconds": seconds, "checks": self._checks}, indent=1)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(text)
        os.replace(temporary, self._path)


def line(section: str, check: Mapping[str, Any]) -> str:
    """A check as text."""
    mark = {True: "pass", False: "FAIL", None: "    "}[check["passed"]]
    figures = "  ".join(f"{key} {_short(value)}" for key, value in check["figures"].items())
    return f"{mark}  {section:9} {check['what']}: {figures}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)


def sync(device: torch.device) -> None:
    """Wait for all that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(job: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Of one of ``times`` runs in a row, by the device's own clock where it has one."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(times):
            job()
        return (time.perf_counter() - began) / times
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(times):
        job()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / times


def interleaved(
    jobs: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, times: int = 1
) -> dict[str, list[float]]:
    """Seconds of each job, round by round, all of them in each round; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            taken = seconds(job, device, times)
            if number:
                found[name].append(taken)
    return found


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and largest of the rounds' ratios."""
    each = [one / other for one, other in zip(ours, theirs, strict=True)]
    return statistics.median(each), min(each), max(each)


def ms(values: Sequence[float]) -> float:
    """The median in milliseconds."""
    return 1e3 * statistics.median(values)


def one_rank(settings: Settings, backend: str | None = None) -> None:
    """A process group of this process alone."""
    if settings.cuda:
        torch.cuda.set_device(settings.device)
    backend = backend or ("nccl" if settings.cuda else "gloo")
    store = dist.FileStore(  # type: ignore[attr-defined]
        str(settings.out / f"store-{os.getpid()}"), 1
    )
    dist.init_process_group(backend, store=store, rank=0, world_size=1)


def run(name: str, section: Callable[[Report, Settings], None]) -> None:
    """The ``main`` of a section's module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--after", type=Path)
    given = parser.parse_args()
    while given.after is not None and not given.after.exists():
        time.sleep(0.05)  # what is imported is imported by now; the device is another section's
    device = torch.device(given.device, 0) if given.device == "cuda" else torch.device(given.device)
    settings = Settings(given.out, given.seconds, device, given.tiny)
    if given.tiny:
        torch.set_num_threads(1)
    report = Report(name, settings)
    try:
        section(report, settings)
    except Exception as error:
        traceback.print_exc()
        report.add("the section", False, error=f"{type(error).__name__}: {error}"[:600])
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        dist.destroy_process_group()
