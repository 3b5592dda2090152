"""Time to a held-out loss over slow links: outlast beside dense DDP, DDP's fp16 hook and PowerSGD, in one run.

    python -m benchmarks.comm [--links none,1gbit,200mbit,50mbit] [--rounds 5] [--steps 2]
                              [--seeds 0,1,2] [--train 150] [--target 2.6] [--variants …] [--ablation] [--json FILE]

The emulated cluster has 4 hosts (network namespaces with rate-limited links) with one rank each; they share this
machine's cores. Two quantities are measured and multiplied:

*Seconds per step*, per link: a rank holds one model per variant. A round runs some steps of each variant on each link
in turn, so drift of the machine affects all variants. Bytes are counted at the hosts' interfaces.

*Held-out loss after each step*, per seed: every variant trains the same model on the same text with the same schedule.
Links do not affect the loss, so this runs once, on unlimited links.

Time to the target is the step at which the held-out loss first passes it, times the median seconds per step. Needs root
and iproute2. ``--train 0`` measures only steps, ``--rounds 0`` only losses.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.cluster import Cluster
from benchmarks.orders import ask

PORT = 29533
HOSTS = 4
LINKS = ("none", "1gbit", "200mbit", "50mbit")
VARIANTS = {
    "dense DDP": "dense",
    "DDP fp16 hook": "fp16",
    "PowerSGD rank 1": "powersgd-1",
    "PowerSGD rank 2": "powersgd-2",
    "PowerSGD rank 4": "powersgd-4",
    "PowerSGD rank 8": "powersgd-8",
    "outlast, its defaults (1 %)": "density=0.01",
    "outlast, density 0.5 %": "density=0.005",
}
"""Label to variant, as :mod:`benchmarks.comm_worker` parses it; the first is the baseline."""
ABLATION = {
    "update, dense": "compressor=dense,target=update",
    "update, dense, beta1 0.9": "compressor=dense,target=update,beta1=0.9",
    "update, ef14 topk 2 %": "density=0.02",
    "update, ef14 topk 1 %, fp32": "values=fp32",
    "update, ef14 topk 1 %, two-phase": "transport=two-phase",
    "update, ef14 topk 1 %, beta1 0.5": "beta1=0.5",
    "update, ef14 topk 1 %, beta1 0.9": "beta1=0.9",
    "update, ef14 topk 1 %, not clipped": "clip_rms=0",
    "update, ef21 topk 1 %": "feedback=ef21",
    "update, econtrol topk 1 %": "feedback=econtrol",
    "update, ef14 block-topk 1 %": "compressor=block-topk",
    "update, ef14 lowrank 4 int8": "compressor=lowrank",
    "gradient, ef14 topk 1 %": "target=gradient",
    "gradient, ef14 topk 5 %": "target=gradient,density=0.05",
    "gradient, ef21 topk 5 %": "target=gradient,feedback=ef21,density=0.05",
    "gradient, ef21-sgdm topk 5 %": "target=gradient,feedback=ef21-sgdm,density=0.05",
    "gradient, econtrol topk 5 %": "target=gradient,feedback=econtrol,density=0.05",
    "gradient, ef14 lowrank 4 int8": "target=gradient,compressor=lowrank",
    "gradient, ef14 sign": "target=gradient,compressor=sign",
    "gradient, ef14 int4, two-phase": "target=gradient,compressor=int4,transport=two-phase",
    "gradient, ef14 int8, two-phase": "target=gradient,compressor=int8,transport=two-phase",
}
"""Added by ``--ablation``: the defaults with one setting changed, and compressed gradients."""


@dataclass(slots=True)
class Steps:
    """Seconds and bytes per step of one variant on one link: one entry per round."""

    step_s: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    """Divided by the same round's dense step on unlimited links."""
    sent_bytes: list[float] = field(default_factory=list)
    """Per host, counted at the network interface."""
    told_bytes: list[float] = field(default_factory=list)
    """Per rank, as outlast reports them; 0 for variants that do not report."""


@dataclass(slots=True)
class Result:
    """All measurements."""

    machine: str
    hosts: int
    tokens: int
    target: float
    variants: dict[str, str]
    steps: dict[str, dict[str, Steps]] = field(default_factory=dict)
    """By variant's label, then by link."""
    losses: dict[str, dict[int, list[tuple[int, float]]]] = field(default_factory=dict)
    """By variant's label, then by seed: (step, held-out loss)."""


class Workers:
    """The ranks, one on each host."""

    def __init__(self, cluster: Cluster, tokens: int, variants: Sequence[str]) -> None:
        hosts = cluster.hosts
        env = dict(os.environ, OMP_NUM_THREADS="1", MASTER_ADDR=hosts[0].address, MASTER_PORT=str(PORT))
        self._processes = [
            host.popen(
                [sys.executable, "-m", "benchmarks.comm_worker", str(tokens), *variants],
                env=env | {"RANK": str(host.index), "WORLD_SIZE": str(len(hosts))},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for host in hosts
        ]

    def ask(self, **order: Any) -> list[dict[str, Any]]:
        """Send all ranks an order and wait for their answers; SystemExit if one has exited."""
        return ask(self._processes, **order)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.stdout.close()
            process.wait(timeout=60)


def measure_steps(
    result: Result, cluster: Cluster, workers: Workers, links: Sequence[str], rounds: int, steps: int
) -> None:
    """Fill ``result.steps``."""
    for spec in result.variants.values():
        workers.ask(
            do="steps", variant=spec, steps=3
        )  # warm-up: allocations, DDP's rebuilt buckets, dense first messages
    result.steps = {label: {link: Steps() for link in links} for label in result.variants}
    for number in range(rounds):
        baseline = None
        for link in links:
            cluster.set_rate(link)
            for label, spec in result.variants.items():
                before = [host.bytes_sent() for host in cluster.hosts]
                answers = workers.ask(do="steps", variant=spec, steps=steps)
                after = [host.bytes_sent() for host in cluster.hosts]
                row = result.steps[label][link]
                row.step_s.append(max(answer["step_s"] for answer in answers))
                baseline = row.step_s[-1] if baseline is None else baseline
                row.ratio.append(row.step_s[-1] / baseline)
                row.sent_bytes.append(max(b - a for a, b in zip(before, after, strict=True)) / steps)
                row.told_bytes.append(max(answer["wire_bytes"] for answer in answers))
        print(f"steps: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    cluster.set_rate("none")


def measure_losses(result: Result, workers: Workers, seeds: Sequence[int], train: int, every: int) -> None:
    """Fill ``result.losses``."""
    for seed in seeds:
        for label, spec in result.variants.items():
            answer = workers.ask(do="learn", variant=spec, seed=seed, steps=train, every=every)[0]
            curve = [(int(step), float(loss)) for step, loss in answer["held_out"]]
            result.losses.setdefault(label, {})[seed] = curve
            reached = steps_to(curve, result.target)
            passed = "not reached" if reached is None else f"reached at step {reached:.0f}"
            print(f"losses: seed {seed}, {label}: {curve[-1][1]:.4f}, {passed}", file=sys.stderr, flush=True)


def steps_to(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """The step at which the curve first passes the target, interpolated between evaluations; None if it does not."""
    before: tuple[int, float] | None = None
    for step, loss in curve:
        if loss <= target:
            if before is None:
                return float(step)
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = (step, loss)
    return None


def measure(
    links: Sequence[str],
    rounds: int,
    steps: int,
    *,
    seeds: Sequence[int] = (),
    train: int = 0,
    every: int = 10,
    target: float = 2.6,
    tokens: int = 256,
    hosts: int = HOSTS,
    variants: dict[str, str] | None = None,
    prefix: str = "olb",
) -> Result:
    """Run the benchmark; SystemExit if a rank fails."""
    chosen = VARIANTS if variants is None else variants
    machine = f"{hosts} ranks on {os.cpu_count()} cores ({platform.machine()}), gloo"
    result = Result(machine, hosts, tokens, target, chosen)
    timed = list(chosen.values()) if rounds else []
    with Cluster(hosts, prefix=prefix) as cluster, Workers(cluster, tokens, timed) as workers:
        if rounds:
            measure_steps(result, cluster, workers, links, rounds, steps)
        if train:
            measure_losses(result, workers, seeds, train, every)
    return result


def steps_text(result: Result, link: str) -> str:
    """Seconds and bytes per step on one link, as an aligned table."""
    lines = [f"{link:36} {'step':>8} {'× baseline':>11} {'(range)':>14} {'MB sent':>9} {'MB told':>9}"]
    for label, by_link in result.steps.items():
        row = by_link[link]
        told = statistics.median(row.told_bytes)
        lines.append(
            f"{label:36} {statistics.median(row.step_s):7.3f}s {statistics.median(row.ratio):10.2f}x "
            f"({min(row.ratio):5.2f}–{max(row.ratio):5.2f}) {statistics.median(row.sent_bytes) / 1e6:9.2f} "
            + (f"{told / 1e6:9.2f}" if told else f"{'–':>9}")
        )
    return "\n".join(lines)


def losses_text(result: Result) -> str:
    """Held-out losses, and steps and seconds to the target on each link, as an aligned table."""
    links = list(next(iter(result.steps.values()), {}))
    lines = [
        f"{'':36} {'last loss':>9} {'(range)':>15} {'steps':>6} {'(range)':>11}" + "".join(f"{x:>10}" for x in links)
    ]
    for label, by_seed in result.losses.items():
        last = [curve[-1][1] for curve in by_seed.values()]
        counts = [steps_to(curve, result.target) for curve in by_seed.values()]
        reached = [count for count in counts if count is not None]
        line = f"{label:36} {statistics.mean(last):9.4f} ({min(last):.4f}–{max(last):.4f})"
        if len(reached) < len(counts):
            lines.append(f"{line} {'–':>6}  target reached with {len(reached)} of {len(counts)} seeds")
            continue
        line += f" {statistics.mean(reached):6.0f} {f'({min(reached):.0f}–{max(reached):.0f})':>11}"
        for link in links:
            seconds = statistics.mean(reached) * statistics.median(result.steps[label][link].step_s)
            line += f"{seconds:9.1f}s"
        lines.append(line)
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; with ``--json`` also write all figures to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--links", default=",".join(LINKS), help="rates of the hosts' links; the first must be unlimited"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of each variant per round and link")
    parser.add_argument(
        "--tokens", type=int, default=256, help="tokens per rank and step, which set the amount of computation"
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--train", type=int, default=150, help="steps of each training run; 0 measures only steps")
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations")
    parser.add_argument("--target", type=float, default=2.6, help="held-out loss, in nats per byte")
    parser.add_argument("--variants", default="", help="comma-separated parts of the labels to measure; all if empty")
    parser.add_argument(
        "--ablation", action="store_true", help="also measure outlast with one setting changed at a time"
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(words)
    known = VARIANTS | ABLATION if given.ablation else VARIANTS
    wanted = [part for part in given.variants.split(",") if part]
    chosen = {label: spec for label, spec in known.items() if not wanted or any(part in label for part in wanted)}
    result = measure(
        given.links.split(","),
        given.rounds,
        given.steps,
        seeds=[int(seed) for seed in given.seeds.split(",")],
        train=given.train,
        every=given.every,
        target=given.target,
        tokens=given.tokens,
        variants=chosen,
    )
    print(f"{result.machine}, GPT of 10.8 M parameters, {given.tokens} tokens per rank")
    if result.steps:
        for link in given.links.split(","):
            print(steps_text(result, link), end="\n\n")
    if result.losses:
        print(f"held-out loss after {given.train} steps; steps and seconds to {given.target:g}")
        print(losses_text(result))
    if given.json is not None:
        given.json.write_text(json.dumps(asdict(result), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
