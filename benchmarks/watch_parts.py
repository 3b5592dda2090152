"""What being watched costs, part by part: where a whole step's ratio drowns in noise, its parts can be told.

    python -m benchmarks.watch_parts [--rounds 200] [--json FILE]

Two processes of one rank each stay up, one under the runner of outlast, and take turns with blocks of the same
calls: collectives that reach no wire, and an optimizer's steps. The difference of two neighbouring blocks is what one
costs more. Looks cost what the watching thread takes of its own CPU clock while the program computes in Python. From
the medians: what a step of 100 ms with 50 collectives costs more, looked at every 10 ms, and every 100 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from outlast.diagnostics.live.flight import buffer_variable
from outlast.diagnostics.live.program_watch import EVERY_S
from outlast.free_port import free_port
from outlast.launch.runner import ATTEMPT, LOOK_EVERY_S, RUN_DIR, STEPS_TAKEN

STEP_S, COLLECTIVES = 0.1, 50
BLOCK = {"collective": 400, "optimizer step": 200}
LOOKS_S = 3.0
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
    calls: dict[str, Callable[[], object]] = {
        "collective": lambda: dist.all_reduce(small),
        "optimizer step": lambda: optimizer.step(),
    }
    for call in calls.values():
        for _ in range(1000):
            call()
    print("ready", flush=True)
    for line in sys.stdin:
        name = line.strip()
        if name in calls:
            call, count = calls[name], BLOCK[name]
            began_s = time.perf_counter()
            for _ in range(count):
                call()
            print((time.perf_counter() - began_s) / count, flush=True)
        else:
            print(_watching_share(LOOKS_S), flush=True)
    dist.destroy_process_group()


def _watching_share(seconds: float) -> float:
    """The watching thread's CPU seconds for each second in which this one computes."""
    (thread,) = (one for one in threading.enumerate() if one.name == "outlast-watch")
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    began_s, used_s = time.perf_counter(), time.clock_gettime(clock)
    while time.perf_counter() - began_s < seconds:
        pass
    return (time.clock_gettime(clock) - used_s) / (time.perf_counter() - began_s)


class Served:
    """A process that answers; watched, with seconds between two looks, unless these are 0."""

    def __init__(self, folder: Path, every_s: float) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        if every_s:
            run = str(folder / f"every_{every_s:g}")
            env |= {RUN_DIR: run, ATTEMPT: "1", STEPS_TAKEN: "0", LOOK_EVERY_S: str(every_s)}
            env[buffer_variable()] = "2000"
            command[1:1] = ["-m", "outlast.launch.runner"]
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
    """Seconds of each part: median, and the quartiles of the differences or repetitions that it is of."""
    found: dict[str, dict[str, float]] = {}
    plain, watched = Served(folder, 0), Served(folder, 1000.0)
    try:
        for part in BLOCK:
            more = []
            for number in range(rounds):
                two = (plain, watched) if number % 2 else (watched, plain)
                took = {one: one.ask(part) for one in two}
                more.append(took[watched] - took[plain])
            found[part] = _spread(more)
            found[part]["unwatched"] = plain.ask(part)
    finally:
        plain.close()
        watched.close()
    for every_s in (EVERY_S, 0.1):
        one = Served(folder, every_s)
        try:
            found[f"looks every {1e3 * every_s:g} ms"] = _spread([one.ask("looks") for _ in range(5)])
        finally:
            one.close()
    return found


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "lower quartile": low, "upper quartile": high}


def share_of_step(found: dict[str, dict[str, float]], every_s: float) -> float:
    """Of a step of ``STEP_S`` with ``COLLECTIVES``, what being watched takes, as if looks ran on the step's core."""
    calls_s = COLLECTIVES * found["collective"]["median"] + found["optimizer step"]["median"]
    return calls_s / STEP_S + found[f"looks every {1e3 * every_s:g} ms"]["median"]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="blocks of each part and process")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), given.rounds)
    for part, one in found.items():
        scale, unit = (1e6, "µs a call more") if part in BLOCK else (100.0, "% of a core")
        low, high = scale * one["lower quartile"], scale * one["upper quartile"]
        print(f"{part:20} {scale * one['median']:7.3f} {unit} (quartiles {low:.3f} to {high:.3f})", end="")
        print(f"; {1e6 * one['unwatched']:.1f} µs unwatched" if "unwatched" in one else "")
    for every_s in (EVERY_S, 0.1):
        share = share_of_step(found, every_s)
        print(
            f"of a step of {1e3 * STEP_S:g} ms with {COLLECTIVES} collectives, looked at every {1e3 * every_s:g} ms: ",
            end="",
        )
        print(f"{100 * share:.3f} %")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
