"""What it costs a program to be watched: the same steps without and with outlast's runner, in turns.

    python -m benchmarks.watch [--ways collectives,ddp,fsdp2,deepspeed] [--rounds 10] [--steps 60] [--json FILE]

A step takes about 100 ms. ``collectives`` issues 50 in each, on one rank, so that no peer's noise is measured: what is
asked is what the recorder, the hook and the watching thread take from the program's own process. The others train a
stack of 16 layers on two ranks of one core each: DDP with a bucket a layer, FSDP2 with each layer sharded, DeepSpeed's
ZeRO 3. ``watch_program`` has the loops. Watched programs are looked at in every step, every 10 ms and every 100 ms,
which costs more than the default.
Prints, for each, the median step unwatched, and the ratio to the unwatched run of the same round: median, lowest and
highest; of wall-clock time, and of the CPU time of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.watch_program import WAYS
from outlast.diagnostics.live.flight import buffer_variable
from outlast.free_port import free_port
from outlast.launch.runner import ATTEMPT, LOOK_EVERY_S, RUN_DIR, STEPS_TAKEN

PROGRAM = Path(__file__).with_name("watch_program.py")
STEP_S = 0.1
EVERY = (0.0, 0.01, 0.1)
"""Seconds between two looks: unwatched, often, seldom."""
TRIALS, TRIAL_SIZE, TRIAL_STEPS = 3, 64, 10
_LIMIT_S = 300


def started(
    program: Path, words: Sequence[str], run: Path, *, ranks: int, every_s: float
) -> tuple[list[str], dict[str, str]]:
    """Command and environment of ``ranks`` ranks, but for their numbers; unwatched if ``every_s`` is 0."""
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.getcwd(),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, str(program), *words]
    if every_s:
        env |= {RUN_DIR: str(run), ATTEMPT: "1", STEPS_TAKEN: "0", LOOK_EVERY_S: str(every_s)}
        env[buffer_variable()] = "2000"
        command[1:1] = ["-m", "outlast.launch.runner"]
    return command, env


def measure(folder: Path, way: str, size: int, steps: int, every_s: float) -> dict[str, float]:
    """The median step of rank 0, wall-clock and CPU seconds; unwatched if ``every_s`` is 0."""
    ranks = 1 if way == "collectives" else 2
    command, env = started(PROGRAM, [way, str(size), str(steps)], folder / "run", ranks=ranks, every_s=every_s)
    processes = [
        subprocess.Popen(
            command,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=_LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, said) in zip(processes, outputs, strict=True):
        if process.returncode != 0:
            raise RuntimeError(f"{way}: a rank exited with status {process.returncode}:\n{said[-3000:]}")
    found = json.loads(outputs[0][0].splitlines()[-1])
    return {name: statistics.median(values) for name, values in found.items()}


def in_turns(folder: Path, way: str, rounds: int, steps: int) -> dict[str, Any]:
    """Unwatched, looked at at both intervals, as often as there are rounds; which comes first rotates."""
    size = TRIAL_SIZE
    for _ in range(TRIALS):  # a part of a step does not grow with the size
        size = max(1, round(size * STEP_S / measure(folder, way, size, TRIAL_STEPS, 0)["wall_s"]))
    found: dict[float, list[dict[str, float]]] = {every_s: [] for every_s in EVERY}
    for number in range(rounds):
        first = number % len(EVERY)
        for every_s in (*EVERY[first:], *EVERY[:first]):
            found[every_s].append(measure(folder, way, size, steps, every_s))
    told: dict[str, Any] = {"rounds": rounds, "steps": steps}
    for key in ("wall_s", "cpu_s"):
        told[key] = {"unwatched": statistics.median(one[key] for one in found[0])}
        for every_s in EVERY[1:]:
            ratios = [one[key] / other[key] for one, other in zip(found[every_s], found[0], strict=True)]
            told[key][f"every {1e3 * every_s:g} ms"] = {
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            }
    return told


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default=",".join(WAYS), help="of " + ", ".join(WAYS))
    parser.add_argument("--rounds", type=int, default=10, help="of one run unwatched and one at each interval")
    parser.add_argument("--steps", type=int, default=60, help="steps of each run")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    given = parser.parse_args()
    ways = given.ways.split(",")
    if unknown := sorted(set(ways) - set(WAYS)):
        parser.error(f"--ways: {', '.join(unknown)}: not one of {', '.join(WAYS)}")
    result = {}
    with tempfile.TemporaryDirectory() as name:
        for way in ways:
            result[way] = told = in_turns(Path(name), way, given.rounds, given.steps)
            for key in ("wall_s", "cpu_s"):
                unwatched, *others = told[key].items()
                print(f"{way:12} {key:6} {1e3 * unwatched[1]:7.1f} ms unwatched", end="")
                for which, one in others:
                    print(f"; {which} x {one['ratio']:.4f} ({one['lowest']:.4f} to {one['highest']:.4f})", end="")
                print(f"; {given.rounds} rounds", flush=True)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
