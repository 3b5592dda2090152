"""What checkpoints cost: outlast beside ``torch.save`` and PyTorch's Distributed Checkpoint, in one run.

    python -m benchmarks.checkpoint [--state-mb 768] [--every 4] [--steps 8] [--rounds 5] [--methods …] [--dir DIR]
                                    [--json FILE]

Two ranks train a perceptron under DDP with AdamW; parameters and moments make up the state. In each round every method
trains some steps, saves at a fixed interval, and then reads the newest checkpoint back. Each round also writes the same
number of bytes with O_DIRECT while nothing else runs. Methods alternate within a round, so drift of the machine affects
all of them, and each saves once before it is timed. ``raw-beside`` is not a checkpoint: it writes the size of the state
with O_DIRECT while training goes on, which shows the cost of the writes alone. ``outlast-memory`` saves to shared
memory after *every* step, and reads back from there.

Prints medians over rounds of the slower rank's figures: seconds per step; its ratio to the step without checkpoints in
the same round; seconds that a save blocked the training thread; seconds until it was durable (``torch.save`` and DCP
sync each file but no directory); seconds to read it back with a cold page cache; and peak memory of both ranks above
that of the first method.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.orders import ask
from outlast.free_port import free_port

METHODS = (
    "none",
    "torch.save",
    "dcp",
    "dcp-async-thread",
    "dcp-async-process",
    "raw-beside",
    "outlast",
    "outlast-memory",
)
EVERY_STEP = ("outlast-memory",)
"""Methods that save after each step and ignore ``--every``."""
RANKS = 2


@dataclass(slots=True)
class Row:
    """The figures of one method: one entry per round, or per save for ``blocked_s`` and ``durable_s``."""

    step_s: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    blocked_s: list[float] = field(default_factory=list)
    durable_s: list[float] = field(default_factory=list)
    durable_ratio: list[float] = field(default_factory=list)
    """Mean of the round's saves, divided by the same round's raw write."""
    load_s: list[float] = field(default_factory=list)
    host_mb: list[float] = field(default_factory=list)


class Ranks:
    """The ranks' processes."""

    def __init__(self, folder: Path, state_mb: float) -> None:
        port = free_port()
        env = dict(
            os.environ, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(RANKS)
        )
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "benchmarks.checkpoint_worker", str(folder), str(state_mb)],
                env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(RANKS)
        ]

    def ask(self, **order: Any) -> list[dict[str, Any]]:
        """Send all ranks an order and wait for their answers; SystemExit if one has exited."""
        return ask(self._processes, **order)

    def close(self) -> None:
        """Let the ranks exit: all at once, since they may wait for one another."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            process.wait(timeout=120)
            assert process.stdout is not None
            process.stdout.close()


def measure(
    folder: Path, state_mb: float, methods: Sequence[str], rounds: int, steps: int, every: int
) -> tuple[dict[str, Row], list[float]]:
    """Run the benchmark; returns rows by method, and the seconds of the raw writes by round."""
    rows = {method: Row() for method in methods}
    raws: list[float] = []
    ranks = Ranks(folder, state_mb)
    number = 0
    for turn in range(-1, rounds):  # the first warms up memory, the allocator and DCP's processes, and does not count
        number += 1
        raw_s = max(answer["durable_s"] for answer in ranks.ask(do="raw", number=number))
        shutil.rmtree(folder / str(number))
        baseline = host_mb = None
        for method in methods:
            number += 1
            interval = 1 if method in EVERY_STEP else every
            answers = ranks.ask(do="run", number=number, method=method, steps=steps, every=interval)
            shutil.rmtree(folder / str(number))
            if turn < 0:
                continue
            row = rows[method]
            row.step_s.append(max(answer["step_s"] for answer in answers))
            baseline = row.step_s[-1] if baseline is None else baseline
            row.ratio.append(row.step_s[-1] / baseline)
            saves = [[answer[key] for answer in answers] for key in ("blocked_s", "durable_s")]
            row.blocked_s += [max(pair) for pair in zip(*saves[0], strict=True)]
            durable = [max(pair) for pair in zip(*saves[1], strict=True)]
            row.durable_s += durable
            if durable:
                row.durable_ratio.append(statistics.mean(durable) / raw_s)
                row.load_s.append(max(answer["load_s"] for answer in answers))
            peak_mb = sum(answer["host_bytes"] for answer in answers) / 1e6
            host_mb = peak_mb if host_mb is None else host_mb
            row.host_mb.append(peak_mb - host_mb)
        if turn >= 0:
            raws.append(raw_s)
            print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    ranks.close()
    return rows, raws


def text(rows: dict[str, Row], raws: Sequence[float]) -> str:
    """The figures as an aligned table."""
    lines = [
        f"{'':20} {'step':>7} {'× none (range)':>20} {'blocked per save (range)':>24} {'durable (range)':>20} "
        f"{'× raw':>6} {'load':>7} {'memory':>9}"
    ]
    for method, row in rows.items():
        line = (
            f"{method:20} {statistics.median(row.step_s):6.2f}s {statistics.median(row.ratio):7.2f} "
            f"({min(row.ratio):.2f}–{max(row.ratio):.2f})"
        )
        if row.durable_s:
            line += (
                f" {statistics.median(row.blocked_s):10.3f}s ({min(row.blocked_s):.2f}–{max(row.blocked_s):.2f})"
                f" {statistics.median(row.durable_s):8.2f}s ({min(row.durable_s):.2f}–{max(row.durable_s):.2f})"
                f" {statistics.median(row.durable_ratio):6.2f} {statistics.median(row.load_s):6.2f}s"
                f" {statistics.median(row.host_mb):6.0f} MB"
            )
        lines.append(line)
    lines.append(f"raw write: {statistics.median(raws):.2f}s ({min(raws):.2f}–{max(raws):.2f})")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; with ``--json`` also write all figures to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state-mb", type=float, default=768.0)
    parser.add_argument("--every", type=int, default=4, help="steps between checkpoints")
    parser.add_argument("--steps", type=int, default=8, help="steps of each method per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS), help="the first is the baseline")
    parser.add_argument("--dir", type=Path, help="a folder on the disk to measure; by default a temporary one")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(words)
    folder = Path(tempfile.mkdtemp(prefix="outlast-bench-", dir=given.dir))
    try:
        rows, raws = measure(folder, given.state_mb, given.methods.split(","), given.rounds, given.steps, given.every)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    cores = os.cpu_count()
    print(f"{given.state_mb:g} MB of state, {RANKS} ranks on {cores} cores, a checkpoint every {given.every} steps")
    print(text(rows, raws))
    if given.json is not None:
        given.json.write_text(json.dumps({"rows": {m: asdict(r) for m, r in rows.items()}, "raw_s": raws}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
