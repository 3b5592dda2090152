"""How well, and how fast, syndromes are told: a confusion matrix over simulated faults, and 4,096 ranks on one core.

    python -m benchmarks.syndromes [--seeds 20] [--nodes 512] [--steps 20]

The traces are simulated (``tests/diagnostics/syndromes/traces.py``), so this runs from the repository's root.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace

from outlast.diagnostics.syndromes.analyse import analyse
from outlast.diagnostics.syndromes.from_steps import judge_steps
from outlast.diagnostics.syndromes.step_trace import MOST_STEPS, NodeSteps
from outlast.diagnostics.syndromes.verdict import SYNDROMES
from tests.diagnostics.syndromes.cases import CASES, Row, confusion
from tests.diagnostics.syndromes.test_step_trace import job
from tests.diagnostics.syndromes.traces import Fault, Layout, Simulation

COLUMNS = (*SYNDROMES, "-")


def print_matrix(rows: list[Row]) -> None:
    """Fault by class that was said, and how often class and culprit were right."""
    heads = ["crash", "numer", "desync", "nc hang", "c hang", "nc slow", "c slow", "nobody"]
    print(f"{'fault':22}" + "".join(f"{one:>9}" for one in heads) + f"{'right':>12}")
    for row in rows:
        cells = "".join(f"{row.classes.get(one, 0) or '.':>9}" for one in COLUMNS)
        print(f"{row.fault:22}{cells}{f'{row.right}/{row.total}':>12}")
        for wrong in row.wrong[:3]:
            print(f"    {wrong}")


def large(nodes: int, steps: int, repeats: int) -> None:
    """Analyse a job of eight ranks a node: one rank is slow in backward; then one hangs."""
    layout = Layout(nodes=nodes, per_node=8, tp=8, pp=8)
    rank = layout.world_size * 2 // 3
    for kind, factor in (("slow_backward", 4.0), ("sleep_before", 1.0)):
        begin = steps // 2 if kind == "slow_backward" else steps - 1
        seconds = 60.0 if kind == "sleep_before" else float("inf")
        fault = Fault(kind=kind, rank=rank, step=begin, factor=factor, seconds=seconds)
        simulation = Simulation(layout, 1, fault, steps).run()
        now_s = float(simulation.t.max()) + 0.01 if kind == "slow_backward" else simulation.begun_s + 40.0
        trace = simulation.trace(now_s)
        took = []
        for _ in range(repeats):
            begun = time.perf_counter()
            said = analyse(trace)
            took.append(time.perf_counter() - begun)
        calls, messages = len(trace.calls), len(trace.links)
        print(
            f"{layout.world_size} ranks, {steps} steps, {calls} calls, {messages} messages, {kind}: "
            f"{min(took):.2f} s, median {sorted(took)[len(took) // 2]:.2f} s of {repeats}"
        )
        for verdict in said[:3]:
            print(f"    {verdict}")


def live(ranks: int, repeats: int) -> None:
    """Judge the steps that all ranks of a job tell while it runs, with the cause of the one that is slow."""
    late, since = 77 % ranks, 30
    nodes = [
        NodeSteps(
            node=node.node,
            now_s=node.now_s,
            ranks=[
                replace(
                    one,
                    delays_s=tuple((0.0, 0.09 * (one.rank == late and step >= since), 0.0, 0.0) for step in one.steps),
                    elements=(8192.0,) * len(one.steps),
                )
                for one in node.ranks
            ],
        )
        for node in job(ranks, MOST_STEPS, {late: (since, 0.1)}, per_node=8)
    ]
    took: list[float] = []
    for _ in range(repeats):
        begun = time.process_time()
        said = judge_steps(nodes, (), world_size=ranks)
        took.append(time.process_time() - begun)
    middle = sorted(took)[len(took) // 2]
    print(f"{ranks} ranks, {MOST_STEPS} steps as told live: {min(took):.2f} s of one core, median {middle:.2f} s")
    for verdict in said or ():
        print(f"    {verdict}")


def main() -> None:
    """Print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--nodes", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.seeds:
        print_matrix(confusion(range(options.seeds), Layout(), tuple(CASES)))
    if options.nodes:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        large(options.nodes, options.steps, options.repeats)
        live(8 * options.nodes, options.repeats)


if __name__ == "__main__":
    main()
