"""What one GPU can prove of outlast: kernels, codec, snapshots, whole runs, speed, company, the recorder.

    python -m benchmarks.gpu --out DIR [--only SECTION] [--minutes 6] [--device cpu --tiny]

Each section is a process of its own with a limit of time; one that fails stops no other. Every check is a line, pass or
fail with its figures, and DIR/results.json has them all; DIR/log.txt has what the sections printed, errors included.
Sections that ask what is right run side by side, those that ask how fast one after the other. The exit status is 1
where a check failed.

One GPU cannot show: NCCL between ranks, NVLink, RDMA, several nodes. ``--device cpu --tiny`` is a trial of the script:
its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.harness import line

PHASES: tuple[dict[str, float], ...] = (
    {"kernels": 80, "feedbacks": 80, "company": 80, "mutation": 80},
    {"runs": 80},
    {"recorder": 15},
    {"codec": 35},
    {"speed": 85},
    {"snapshot": 120},
)
"""Sections that run side by side, each with the seconds it may take; six minutes are usual."""
SECTIONS = tuple(name for phase in PHASES for name in phase)
GRACE_S = 10.0


def machine() -> dict[str, Any]:
    """Where this runs."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "when": time.strftime("%Y-%m"),
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        ask = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        found["driver, memory"] = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
    return found


class Process:
    """A section at work.

    Args:
        name: of the section.
        folder: where it writes.
        limit_s: after which it is to leave out what is left, counted from :meth:`go`.
        more: further arguments.
    """

    def __init__(self, name: str, folder: Path, limit_s: float, more: Sequence[str]) -> None:
        self.name = name
        self._folder = folder
        self._log = (folder / f"{name}.log").open("wb")
        self._after = folder / f"{name}.go"
        words = ["--out", str(folder), "--seconds", f"{limit_s:.0f}", "--after", str(self._after), *more]
        self._limit_s = limit_s
        self._until = 0.0
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.gpu.{name}", *words],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            # Side by side, each with as many threads as there are cores, they would wait for one another.
            env={"PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "2", **os.environ},
            start_new_session=True,
        )

    def go(self) -> None:
        """Have it begin; until then it only imports what it needs."""
        self._until = time.monotonic() + self._limit_s + GRACE_S
        self._after.touch()

    def finish(self) -> dict[str, Any]:
        """What it found, once it has ended, or was ended."""
        status: int | str
        try:
            status = self._process.wait(max(0.0, self._until - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            status = "was ended: it took too long"
        self._log.close()
        path = self._folder / f"{self.name}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"checks": []}
        if status:
            found["checks"].append({"what": "the process", "passed": False, "figures": {"status": status}})
        return found


def main(words: Sequence[str] | None = None) -> int:
    """Run the sections, print their lines, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", choices=SECTIONS)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(words)
    given.out.mkdir(parents=True, exist_ok=True)
    more = ["--device", given.device, *(["--tiny"] if given.tiny else [])]
    results: dict[str, Any] = {"machine": machine(), "sections": {}}
    print(results["machine"], flush=True)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="outlast-gpu-") as name, (given.out / "log.txt").open("wb") as log:
        phases = [[one for one in phase if not given.only or one in given.only] for phase in PHASES]
        limits = {one: limit for phase in PHASES for one, limit in phase.items()}

        def start(wanted: list[str]) -> list[Process]:
            return [Process(one, Path(name), limits[one] * given.minutes / 6.0, more) for one in wanted]

        phases = [phase for phase in phases if phase]
        coming = start(phases[0]) if phases else []
        for number in range(len(phases)):
            jobs = coming
            for job in jobs:
                job.go()
            coming = start(phases[number + 1]) if number + 1 < len(phases) else []
            for job in jobs:
                found = results["sections"][job.name] = job.finish()
                for check in found["checks"]:
                    print(line(job.name, check), flush=True)
                    failed += check["passed"] is False
                log.write(f"\n==== {job.name}\n".encode() + (Path(name) / f"{job.name}.log").read_bytes())
                log.flush()
                (given.out / "results.json").write_text(json.dumps(results, indent=1))
    checks = [check for found in results["sections"].values() for check in found["checks"]]
    print(
        f"{sum(check['passed'] is True for check in checks)} passed, {failed} failed, on one GPU at most: nothing here"
    )
    print("shows NCCL between ranks, NVLink, RDMA or several nodes")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
