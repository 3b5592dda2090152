"""Which fault is told as what, of whom, and how soon: faults in a job of several emulated nodes, one after another.

    sudo python -m benchmarks.faults [--nodes 4] [--rounds 20] [--only KIND,…] [--seed 1] [--json FILE]

A node has one rank, started by its own ``outlast launch``. Each start of the program (``fault_program``) suffers one
fault, of a rank drawn from a seed; the restart after it suffers the next. What is told is read from the launchers'
events: ranks that are suspected, that hang, or that failed. The first of these is the verdict; its time is counted from
the moment before the fault. Settings are the defaults, but for ``launch.alone_limit_s``, so that ranks that do nothing
are ended after 24 s and not 180 s. Prints a table: for each kind of fault, how often its class and its rank were right,
the seconds to the verdict (median, slowest), and how often others were accused too. Exit status 1 if a rank was ended,
or accused, that was only slow.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.cluster import Cluster
from outlast.events import Record, read_events

PROGRAM = Path(__file__).with_name("fault_program.py")
HANG, CRASH, ORDER, NONE = "hang", "crash", "desynchronised", "nothing"
ENDING = {
    "SIGKILL": CRASH,
    "SIGSTOP": HANG,
    "exit with status 0": CRASH,
    "exception": CRASH,
    "segmentation fault": CRASH,
    "sleep before a collective": HANG,
    "interpreter's lock held": HANG,
    "skipped collective": ORDER,
    "collective of another size": ORDER,
    "other collective": ORDER,
}
"""Faults that end a start, and the class that is right."""
PASSING = {"all evaluate": NONE, "slow": NONE, "garbage collection": NONE}
"""Those that do not: nobody may be killed for them."""
TELLING = ("hang_suspected", "hang_found", "workers_failed")
ENDS_JOB = ("exit with status 0",)
"""Where it is a node's only rank, its launcher takes it for the end, and so it has a job of its own here."""
STEPS = 140
LIMIT_S = 240.0


@dataclass(frozen=True)
class Told:
    """What a start's launchers said."""

    kind: str
    rank: int | str
    seconds: float | None
    said: str
    named: tuple[int, ...]
    text: str

    @property
    def right_class(self) -> bool:
        return self.said == (ENDING | PASSING)[self.kind]

    @property
    def right_rank(self) -> bool:
        return self.named[:1] == (self.rank,) if self.said != NONE else self.kind in PASSING


def run_of(folder: Path, cluster: Cluster, faults: list[tuple[str, int | str]]) -> list[Told]:
    """One job, whose start number N suffers ``faults[N]``; the last of them is one that it survives."""
    plans = folder / "plans"
    plans.mkdir(parents=True)
    for number, (kind, rank) in enumerate(faults):
        (plans / f"{number}.json").write_text(json.dumps({"kind": kind, "rank": rank}))
    run = folder / "run"
    words = ["-m", "outlast", "launch", "--nnodes", str(len(cluster.hosts)), "--nproc-per-node", "1"]
    words += ["--rdzv-endpoint", f"{cluster.hosts[0].address}:29533", "--max-restarts", str(len(faults))]
    words += ["--run-dir", str(run), "--launch.alone-limit-s", "8"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    jobs = []
    for host in cluster.hosts:
        with (folder / f"node{host.index}.log").open("w") as log:
            command = [sys.executable, *words, "--node-rank", str(host.index), "--local-addr", host.address]
            command += [str(PROGRAM), str(plans), str(STEPS)]
            jobs.append(host.popen(command, env=env, stdout=log, stderr=log, cwd=os.getcwd()))
    try:
        deadline_s = time.monotonic() + LIMIT_S * len(faults)
        statuses = [job.wait(max(1.0, deadline_s - time.monotonic())) for job in jobs]
    except subprocess.TimeoutExpired:
        statuses = [-1]
    finally:
        for job in jobs:
            job.kill()
    lacking = [number for number in range(len(faults)) if not (plans / f"{number}.began").exists()]
    if any(statuses) and lacking:  # a fault ended the job, and those after it could not be provoked
        logs = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("node*.log")))
        raise RuntimeError(f"the job with {faults} ended with {statuses}:\n{logs}")
    files = [*run.glob("events/*.jsonl"), *run.glob("attempts/*/events/*.jsonl")]
    found = [record for path in files for record in read_events(path)]
    return [told_of(plans, number, *fault, found) for number, fault in enumerate(faults)]


def told_of(plans: Path, number: int, kind: str, rank: int | str, found: Iterable[Record]) -> Told:
    """What was told of one start."""
    began = plans / f"{number}.began"
    if not began.exists():
        return Told(kind, rank, None, "not provoked", (), "")
    began_s = float(began.read_text())
    mine = [one for one in found if one.generation == number and one.kind in TELLING]
    verdicts = [(one.t, *_verdict(one)) for one in sorted(mine, key=lambda one: one.t)]
    named = tuple(dict.fromkeys(rank for _, _, ranks, _ in verdicts for rank in ranks))
    for t, said, ranks, text in verdicts:
        if ranks:
            return Told(kind, rank, t - began_s, said, named, text)
    return Told(kind, rank, None, NONE, (), "")


def _verdict(one: Record) -> tuple[str, list[int], str]:
    if one.kind != "workers_failed":
        return (ORDER if "desynchronised" in one["evidence"] else HANG), [one["culprit"]], one["evidence"]
    text = "; ".join(one["reasons"])
    said = ORDER if "desynchronised" in text else HANG if "hung" in text or "hangs" in text else CRASH
    return said, list(one["ranks"]), text


def table(results: list[Told]) -> str:
    """A line for each kind."""
    lines = [f"{'fault':28} {'n':>3} {'class':>6} {'rank':>6} {'median':>8} {'slowest':>8}  others accused"]
    for kind in ENDING | PASSING:
        ones = [one for one in results if one.kind == kind]
        if not ones:
            continue
        took = [one.seconds for one in ones if one.seconds is not None]
        times = f"{statistics.median(took):7.2f}s {max(took):7.2f}s" if took else f"{'-':>8} {'-':>8}"
        others = sum(bool(set(one.named) - {one.rank}) for one in ones)
        classes, ranks = sum(one.right_class for one in ones), sum(one.right_rank for one in ones)
        lines.append(f"{kind:28} {len(ones):3} {classes:6} {ranks:6} {times}  {others}")
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20, help="of every fault once")
    parser.add_argument("--only", default="", help="kinds of faults, with commas between them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    given = parser.parse_args()
    only = given.only.split(",") if given.only else [*ENDING, *PASSING]
    if unknown := sorted(set(only) - {*ENDING, *PASSING}):
        parser.error(f"--only: {', '.join(unknown)}: not one of {', '.join([*ENDING, *PASSING])}")
    draw, results = random.Random(given.seed), []
    ending, passing = [one for one in only if one in ENDING], [one for one in only if one in PASSING]
    with tempfile.TemporaryDirectory() as name, Cluster(given.nodes, prefix="olf", subnet="10.97.0") as cluster:
        for number in range(given.rounds):
            draw.shuffle(ending)
            ending.sort(key=ENDS_JOB.__contains__)
            faults: list[tuple[str, int | str]] = [(kind, draw.randrange(given.nodes)) for kind in ending]
            last = passing[number % len(passing)] if passing else ""
            own = [(last, "all" if last.startswith("all") else draw.randrange(given.nodes))]
            if ending and ending[-1] in ENDS_JOB:
                results += run_of(Path(name) / f"{number}_own", cluster, [faults.pop()])
            faults += own
            found = run_of(Path(name) / str(number), cluster, faults)
            results += found if last else found[:-1]
            for one in found:
                print(f"{number}: {one.kind or 'none'} of {one.rank}: {one.said} {one.named} {one.seconds}", flush=True)
                print(f"    {one.text[:200]}", flush=True)
    print(table(results))
    if given.json:
        given.json.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")
    return int(any(one.kind in PASSING and one.said != NONE for one in results))


if __name__ == "__main__":
    sys.exit(main())
