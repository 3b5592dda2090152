"""What it costs a program to be watched: the same steps with and without outlast's runner, in turns.

    python -m benchmarks.watch [--rounds 10] [--steps 60]

Each step issues 50 collectives and computes for about 100 ms in all. One rank, so that no peer's noise is measured:
what is asked is what the recorder, the hook and the watching thread take from the program's own process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from outlast.diagnostics.live.flight import buffer_variable
from outlast.launch.runner import ATTEMPT, RUN_DIR, STEPS_TAKEN

PROGRAM = """
import json, sys, time
import torch, torch.distributed as dist

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.set_num_threads(1)
a, small = torch.randn(256, 256), torch.ones(1024)
optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(4))], lr=0.1)
products, steps = int(sys.argv[1]), int(sys.argv[2])
walls, cpus = [], []
for _ in range(steps):
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    for _ in range(50):
        for _ in range(products):
            a @ a
        dist.all_reduce(small)
    optimizer.step()
    walls.append(time.perf_counter() - wall_s)
    cpus.append(time.process_time() - cpu_s)
print(json.dumps({"wall_s": walls, "cpu_s": cpus}))
"""


def measure(folder: Path, products: int, steps: int, *, watched: bool) -> dict[str, float]:
    """The median step of one process, wall-clock and CPU seconds."""
    script = folder / "program.py"
    script.write_text(PROGRAM)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, str(script), str(products), str(steps)]
    if watched:
        env |= {RUN_DIR: str(folder / "run"), ATTEMPT: "1", STEPS_TAKEN: "0", buffer_variable(): "2000"}
        command[1:1] = ["-m", "outlast.launch.runner"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return {name: statistics.median(values) for name, values in json.loads(done.stdout.splitlines()[-1]).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="pairs of processes, one watched and one not")
    parser.add_argument("--steps", type=int, default=60, help="steps of each process")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one_s = measure(folder, 10, 5, watched=False)["wall_s"]
        products = max(1, round(10 * 0.1 / one_s))
        ratios: dict[str, list[float]] = {"wall_s": [], "cpu_s": []}
        for round_number in range(given.rounds):
            order = (False, True) if round_number % 2 else (True, False)
            found = {watched: measure(folder, products, given.steps, watched=watched) for watched in order}
            for key, values in ratios.items():
                values.append(found[True][key] / found[False][key])
            print(
                f"step {1e3 * found[False]['wall_s']:.1f} ms, watched {1e3 * found[True]['wall_s']:.1f} ms", flush=True
            )
    for key, values in ratios.items():
        print(
            f"{key}: watched / not {statistics.median(values):.4f} "
            f"({min(values):.4f} to {max(values):.4f}), {given.rounds} pairs"
        )


if __name__ == "__main__":
    main()
