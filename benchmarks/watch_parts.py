"""What being watched costs, part by part: where a whole step's ratio drowns in noise, its parts can be told.

    python -m benchmarks.watch_parts [--rounds 200] [--json FILE]

Processes of one rank each stay up, one of them unwatched, and take turns with blocks of the same calls: collectives
that reach no wire, an optimizer's steps, and 20 ms of work that holds the interpreter's lock (Python) or not (a matrix
product), while the watch looks every 10 ms, or every 100 ms. The difference of two neighbouring blocks is what one
costs more. From the medians: what a step of 100 ms with 50 collectives costs more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.watch import started
from outlast.diagnostics.live.looks import EVERY_S

STEP_S, COLLECTIVES = 0.1, 50
BLOCK = {"collective": 400, "optimizer step": 200, "20 ms of Python": 1, "20 ms of a matrix product": 1}
WORK_S, WORK = 0.02, ("20 ms of Python", "20 ms of a matrix product")
SELDOM_S = 1000.0
"""Between two looks, where what is measured is not the looks."""
_LIMIT_S = 120


def serve() -> None:
    """As a program: answer each line, the name of a part, with the seconds that a call of it took."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    small = torch.ones(1)
    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.zeros(4)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    square = torch.randn(256, 256)
    rounds, products = int(sys.argv[2]), int(sys.argv[3])
    calls: dict[str, Callable[[], object]] = {
        "collective": lambda: dist.all_reduce(small),
        "optimizer step": lambda: optimizer.step(),
        "20 ms of Python": lambda: sum(number & 3 for number in range(rounds)),
        "20 ms of a matrix product": lambda: [square @ square for _ in range(products)],
    }
    for name, call in calls.items():
        for _ in range(20 if name in WORK else 1000):
            call()
    print("ready", flush=True)
    for line in sys.stdin:
        call, count = calls[line.strip()], BLOCK[line.strip()]
        began_s = time.perf_counter()
        for _ in range(count):
            call()
        print((time.perf_counter() - began_s) / count, flush=True)
    dist.destroy_process_group()


class Served:
    """A process that answers; watched, with seconds between two looks, unless these are 0."""

    def __init__(self, folder: Path, every_s: float, work: tuple[int, int]) -> None:
        words, run = ["--serve", *map(str, work)], folder / f"every_{every_s:g}"
        command, env = started(Path(__file__).resolve(), words, run, ranks=1, every_s=every_s)
        env |= {"RANK": "0", "LOCAL_RANK": "0"}
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if (said := self._read()) != "ready":
            raise RuntimeError(f"a process that was to be measured said {said!r}")

    def ask(self, part: str) -> float:
        """The seconds of one call of a part."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{part}\n")
        self._process.stdin.flush()
        return float(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_LIMIT_S)
        finally:
            self._process.kill()


def measure(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each part: median, and the quartiles of the differences that it is of."""
    plain = Served(folder, 0, (400_000, 40))
    took = [statistics.median(plain.ask(part) for _ in range(20)) for part in WORK]
    plain.close()
    work = round(400_000 * WORK_S / took[0]), max(1, round(40 * WORK_S / took[1]))
    served = {every_s: Served(folder, every_s, work) for every_s in (0.0, SELDOM_S, EVERY_S, 0.1)}
    found: dict[str, dict[str, float]] = {}
    try:
        for part in BLOCK:
            watched = (EVERY_S, 0.1) if part in WORK else (SELDOM_S,)
            more: dict[float, list[float]] = {every_s: [] for every_s in watched}
            alone = []
            for number in range(rounds):
                turn = (0.0, *watched) if number % 2 else (*watched, 0.0)
                once = {every_s: served[every_s].ask(part) for every_s in turn}
                alone.append(once[0.0])
                for every_s in watched:
                    more[every_s].append(once[every_s] - once[0.0])
            for every_s, values in more.items():
                name = part if every_s == SELDOM_S else f"{part}, looked at every {1e3 * every_s:g} ms"
                found[name] = _spread(values) | {"unwatched": statistics.median(alone)}
    finally:
        for one in served.values():
            one.close()
    return found


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "lower quartile": low, "upper quartile": high}


def share_of_step(found: dict[str, dict[str, float]], every_s: float, work: str) -> float:
    """Of a step of ``STEP_S`` with ``COLLECTIVES``, what being watched takes."""
    calls_s = COLLECTIVES * found["collective"]["median"] + found["optimizer step"]["median"]
    looked = found[f"{work}, looked at every {1e3 * every_s:g} ms"]
    return calls_s / STEP_S + looked["median"] / looked["unwatched"]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="blocks of each part and process")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--serve", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), given.rounds)
    for part, one in found.items():
        low, middle, high = (1e6 * one[key] for key in ("lower quartile", "median", "upper quartile"))
        print(f"{part:52} {middle:8.2f} µs more (quartiles {low:.2f} to {high:.2f})", end="")
        print(f" than {1e6 * one['unwatched']:.1f} µs unwatched")
    for every_s in (EVERY_S, 0.1):
        for work in WORK:
            share = 100 * share_of_step(found, every_s, work)
            print(
                f"a step of {1e3 * STEP_S:g} ms with {COLLECTIVES} collectives, the rest {work.partition('of ')[2]}, ",
                end="",
            )
            print(f"looked at every {1e3 * every_s:g} ms: {share:.2f} % more")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
