"""From the crash of a rank to the next step: with standbys, without, and with stock torchrun, one after another.

    python -m benchmarks.recovery [--ranks 2] [--rounds 5] [--json FILE]

Each round starts the same script (``recovery_program``) by each launcher in turn, lets it train, and kills one rank by
SIGKILL. Wall time, per phase, each until the last rank is through:

- ``detect``: until the launcher has reaped the killed rank;
- ``end_peers``: until no old rank is left;
- ``restart``: rendezvous and start, until every new rank runs the script's first line;
- ``imports``: of the script;
- ``meet``: ``init_process_group``;
- ``first_step``: from there until every rank has taken a step.

Both have their default monitor interval (torchrun 0.1 s). With standbys the rank is killed once they wait. Prints a
table of medians and of the fastest and slowest round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

PROGRAM = Path(__file__).with_name("recovery_program.py")
PHASES = ("detect", "end_peers", "restart", "imports", "meet", "first_step", "total")
TRAIN_S = 3.0
LIMIT_S = 240.0
LOOK_S = 0.002


def command(launcher: str, ranks: int, folder: Path) -> list[str]:
    """How a launcher is started."""
    if launcher == "torchrun":
        words = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "3"]
    else:
        words = ["-m", "outlast", "launch", "--run-dir", str(folder / "run")]
        words += (
            ["--launch.standby", "on", "--launch.standby-after-s", "1"]
            if launcher == "outlast, standby"
            else ["--no-standby"]
        )
    return [sys.executable, *words, "--nproc-per-node", str(ranks), str(PROGRAM), str(folder)]


T = TypeVar("T")
LAUNCHERS = ("outlast, standby", "outlast", "torchrun")


def one_round(launcher: str, ranks: int, victim: int) -> dict[str, float]:
    """Seconds per phase of one crash."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command(launcher, ranks, folder), stdout=log, stderr=log, start_new_session=True)
        try:
            old = _wait(lambda: _told(folder, ranks), process, folder)
            time.sleep(TRAIN_S)
            if launcher == "outlast, standby":
                _wait(lambda: _standbys(process.pid) == ranks, process, folder)
            pids = {one["rank"]: pid for pid, one in old.items()}
            killed_s = time.time()
            os.kill(pids[victim], signal.SIGKILL)
            _wait(lambda: not Path(f"/proc/{pids[victim]}").exists(), process, folder)
            reaped_s = time.time()
            _wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in old), process, folder)
            ended_s = time.time()
            new = _wait(lambda: _told(folder, ranks, apart_from=old), process, folder)
            (folder / "stop").touch()
            process.wait(LIMIT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(LIMIT_S)
    ends = [
        killed_s,
        reaped_s,
        ended_s,
        *(max(one[key] for one in new.values()) for key in ("began", "imported", "met", "stepped")),
    ]
    found = {name: after - before for name, before, after in zip(PHASES[:-1], ends, ends[1:], strict=False)}
    return {**found, "total": ends[-1] - killed_s}


def _told(
    folder: Path, ranks: int, apart_from: dict[int, dict[str, float]] | None = None
) -> dict[int, dict[str, float]]:
    """What all ranks of a start have written; nothing before all have."""
    paths = [path for path in folder.glob("*.json") if int(path.stem) not in (apart_from or {})]
    return {int(path.stem): json.loads(path.read_text()) for path in paths} if len(paths) == ranks else {}


def _standbys(launcher: int) -> int:
    """How many of a launcher's standbys wait."""
    children = psutil.Process(launcher).children()
    names = []
    for one in children:
        with contextlib.suppress(OSError):
            names.append(Path(f"/proc/{one.pid}/comm").read_text().strip())
    return names.count("outlast-standby")


def _wait(found: Callable[[], T], process: subprocess.Popen[bytes], folder: Path) -> T:
    deadline_s = time.monotonic() + LIMIT_S
    while not (result := found()):
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise SystemExit(f"the launcher has ended, or nothing happens:\n{(folder / 'log').read_text()}")
        time.sleep(LOOK_S)
    return result


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Medians, and of the total the fastest and slowest round, in seconds."""
    lines = [f"| {'seconds':<17} | {' | '.join(f'{name:>10}' for name in PHASES)} | {'from, to':>13} |"]
    lines.append(f"| {'-' * 17} | {' | '.join(['-' * 9 + ':'] * len(PHASES))} | {'-' * 12}: |")
    for launcher, rounds in results.items():
        middle = [statistics.median(one[name] for one in rounds) for name in PHASES]
        totals = [one["total"] for one in rounds]
        spread = f"{min(totals):.2f}, {max(totals):.2f}"
        lines.append(f"| {launcher:<17} | {' | '.join(f'{value:>10.2f}' for value in middle)} | {spread:>13} |")
    return "\n".join(lines)


def main() -> None:
    """See the docstring of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=LAUNCHERS, action="append", help="this launcher; several times for several")
    parser.add_argument("--json", type=Path, help="where to write all rounds")
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.only or LAUNCHERS}
    loads = []
    for number in range(arguments.rounds):
        for launcher, rounds in results.items():
            loads.append(os.getloadavg()[0])
            rounds.append(one_round(launcher, arguments.ranks, victim=number % arguments.ranks))
            print(f"round {number + 1}: {launcher}: {rounds[-1]['total']:.2f} s", file=sys.stderr, flush=True)
    print(table(results))
    if arguments.json:
        told = {"ranks": arguments.ranks, "cores": os.cpu_count(), "load": loads, "seconds": results}
        arguments.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
