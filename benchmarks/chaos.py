"""Kills ranks and nodes of a run at random; the run must end bit-identical to one without failures.

    sudo python -m benchmarks.chaos --kills 100

The run has 4 ranks on 2 emulated nodes. Ranks are processes that run the trainer of ``outlast train``; a node is a
mount namespace with its own file system at ``/dev/shm`` and its own disk. At random steps a random rank is killed with
SIGKILL, or all ranks of a node. Sometimes the node's memory is lost too, or that of all nodes at once, as in a power
failure. Then the other ranks are stopped and all are restarted, as the launcher does.

Needs root. Prints JSON: what was killed, the step and tiers that each restart restored from, how many steps were redone
at most, and whether the result is bit-identical. Exit status 1 if it is not, or if a restart restored an older step
than the remaining tiers had committed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import zarr

from benchmarks.namespace import memories, mount_over
from outlast.diagnostics.live import (
    heartbeat_path,
    read_heartbeat,
)
from outlast.diagnostics.live.shm import shm_directory
from outlast.errors import DiagnosticsError
from outlast.events import Record, read_events
from outlast.free_port import free_port
from outlast.launch import Place

RANKS, NODES = 4, 2
PARTNER_EVERY_STEPS, LOCAL_EVERY_STEPS = 2, 4
_TO_END = 5
"""The last steps, in which nothing is killed, because the run might end first."""
_LOSES_NODE, _LOSES_ITS_MEMORY, _LOSES_ALL_MEMORY = 0.3, 0.5, 0.1
_LIMIT_S = 120.0
_LAST_WORDS_S, _LAST_WORDS_CHARACTERS = 5.0, 3000
_CONFIG = """
[run]
name = "chaos"
dir = "{dir}"

[model]
layers = 2
heads = 2
width = 48
context = 48

[data]
files = ["{{stdlib}}/json/*.py"]
held_out_share = 0.3
batch_size = 2

[trainer]
steps = {steps}
eval_every_steps = 0
eval_batches = 1
bucket_mb = 0.1
timeout_s = 60

[comm]
target = "gradient"
feedback = "ef21"
density = 0.05
warmup_steps = 3
dense_below = 64

[checkpoint]
every_steps = 20
keep_last = 2
memory_every_steps = 1
partner_every_steps = {partner}
local_every_steps = {local}
local_dir = "{disk}"
commit_timeout_s = 30
"""


@dataclass
class Kill:
    """One failure, and the restart after it."""

    at_step: int
    ranks: list[int]
    memory_lost_of_nodes: list[int]
    saved: dict[str, int]
    """The newest step that was committed then, by tier."""
    resumed_step: int = 0
    tiers: dict[str, int] = field(default_factory=dict)
    """Bytes that all ranks read from each tier at the restart."""

    @property
    def left(self) -> int:
        """The newest step that the remaining tiers had committed."""
        least = ("memory", "partner", "local")[len(self.memory_lost_of_nodes)]
        return max(self.saved[least], self.saved["storage"])

    @property
    def done_again(self) -> int:
        """Steps that were redone although they had been committed in memory."""
        return self.saved["memory"] - self.resumed_step


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=0, help="steps of the run; 0: four per kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args(arguments)
    if os.geteuid() != 0:
        print(f"chaos: mounting file systems needs root, but this is uid {os.geteuid()}", file=sys.stderr)
        return 2
    steps = options.steps or 4 * options.kills
    with tempfile.TemporaryDirectory(prefix="outlast-chaos-") as folder:
        result = _compare(Path(folder), options.kills, steps, random.Random(options.seed))
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return 0 if result["bit_identical"] and result["restarts_behind_what_was_saved"] == 0 else 1


def _compare(folder: Path, kills: int, steps: int, chance: random.Random) -> dict[str, Any]:
    began = time.monotonic()
    with memories(folder, NODES) as nodes:
        straight = _Job(folder / "straight", steps, nodes)
        straight.start(0)
        straight.join()
        straight_s = time.monotonic() - began
        job = _Job(folder / "run", steps, nodes)
        done = _run_with_kills(job, sorted(chance.choices(range(2, steps - _TO_END), k=kills)), chance)
        same = _same(straight.run, job.run, steps)
    slowest = ("storage", "local", "partner", "memory")
    tiers = Counter(next((tier for tier in slowest if tier in kill.tiers), "none") for kill in done)
    lost = [[kill for kill in done if len(kill.memory_lost_of_nodes) == count] for count in range(NODES + 1)]
    return {
        "ranks": RANKS,
        "nodes": NODES,
        "steps": steps,
        "kills": len(done),
        "nodes_lost_with_their_memory": len(lost[1]),
        "all_memory_lost": len(lost[2]),
        "restores_by_slowest_tier_used": dict(tiers),
        "interval_steps": {"memory": 1, "partner": PARTNER_EVERY_STEPS, "local": LOCAL_EVERY_STEPS},
        "most_steps_done_again": {
            "no memory lost": max((kill.done_again for kill in lost[0]), default=0),
            "a node's": max((kill.done_again for kill in lost[1]), default=0),
            "all": max((kill.done_again for kill in lost[2]), default=0),
        },
        "restarts_behind_what_was_saved": sum(kill.resumed_step < kill.left for kill in done),
        "bit_identical": same,
        "straight_s": round(straight_s, 1),
        "seconds": round(time.monotonic() - began, 1),
        "each": [asdict(kill) for kill in done],
    }


class _Job:
    """The processes of one run."""

    def __init__(self, run: Path, steps: int, nodes: list[Path]) -> None:
        self.run = run
        self.nodes = nodes
        self.config = run.with_suffix(".toml")
        self.disk = run.with_suffix(".disk")
        self.disk.mkdir()
        text = _CONFIG.format(
            dir=run, steps=steps, partner=PARTNER_EVERY_STEPS, local=LOCAL_EVERY_STEPS, disk=self.disk
        )
        self.config.write_text(text)
        self.processes: list[multiprocessing.process.BaseProcess] = []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["outlast.trainer.main", "torch.distributed.elastic.multiprocessing.errors"]
        )

    def start(self, generation: int) -> None:
        """Start all ranks."""
        port = free_port()
        self.processes = []
        for rank in range(RANKS):
            node = rank * NODES // RANKS
            place = Place(
                rank=rank,
                world_size=RANKS,
                local_rank=rank % (RANKS // NODES),
                local_world_size=RANKS // NODES,
                master_addr="127.0.0.1",
                master_port=port,
                generation=generation,
                source="chaos",
            )
            log = self.run.with_suffix(f".{rank}.log")
            disk = self.run.with_suffix(f".disk{node}")
            disk.mkdir(exist_ok=True)
            mounts = {str(self.nodes[node]): "/dev/shm", str(disk): str(self.disk)}
            arguments = (str(self.config), place, mounts, str(log))
            process = self._context.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            self.processes.append(process)

    def join(self) -> None:
        """Wait until all ranks have succeeded, or one has not.

        Raises:
            RuntimeError: a rank failed, or the time is over; with the last words of each rank that has not succeeded.
        """
        deadline = time.monotonic() + _LIMIT_S
        waiting = list(self.processes)
        while waiting and time.monotonic() < deadline and not any(process.exitcode for process in self.processes):
            multiprocessing.connection.wait([process.sentinel for process in waiting], timeout=1)
            waiting = [process for process in waiting if process.exitcode is None]
        for process in waiting:  # what the loss of a peer makes of them
            process.join(_LAST_WORDS_S)
        failed = [rank for rank, process in enumerate(self.processes) if process.exitcode != 0]
        if failed:
            raise RuntimeError(self.last_words(failed))

    def last_words(self, ranks: Iterable[int]) -> str:
        """How these ranks ended, as far as they have, and the last lines of their logs."""
        return "\n".join(
            f"rank {rank}, exit status {self.processes[rank].exitcode}:\n"
            + self.run.with_suffix(f".{rank}.log").read_text()[-_LAST_WORDS_CHARACTERS:]
            for rank in ranks
        )

    def kill(self, ranks: list[int]) -> None:
        """Kill some ranks at once, and then the others, as the launcher does."""
        for rank in ranks:
            self.processes[rank].kill()
        for process in self.processes:
            process.join(0.05)
            process.kill()
            process.join()

    def step(self) -> int:
        """The lowest step that a rank is in; 0 until all ranks are in a step."""
        beats = []
        for rank in range(RANKS):
            shm = shm_directory(self.run)
            path = self.nodes[rank * NODES // RANKS] / shm.name / heartbeat_path(shm, rank).name
            try:
                beat = read_heartbeat(path)
            except (DiagnosticsError, FileNotFoundError):
                return 0
            if beat.pid != self.processes[rank].pid:
                return 0
            beats.append(beat.step)
        return min(beats)

    def events(self, kind: str) -> list[Record]:
        """The events of all ranks and attempts, oldest first."""
        found = []
        for path in sorted(self.run.glob("attempts/[0-9]*/events/rank_*.jsonl")):
            found += [record for record in read_events(path) if record.kind == kind]
        return sorted(found, key=lambda record: record.t)


def _run_with_kills(job: _Job, at_steps: list[int], chance: random.Random) -> list[Kill]:
    done: list[Kill] = []
    job.start(0)
    for number, at_step in enumerate(at_steps):
        deadline = time.monotonic() + _LIMIT_S
        while job.step() < at_step:
            if time.monotonic() > deadline or not any(process.is_alive() for process in job.processes):
                raise RuntimeError(
                    f"step {at_step} was not reached within {_LIMIT_S:g} s:\n{job.last_words(range(RANKS))}"
                )
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        ranks, lost = _choose(chance)
        job.kill(ranks)
        for node in lost:
            for path in job.nodes[node].iterdir():
                shutil.rmtree(path)
        done.append(Kill(at_step, ranks, lost, _saved(job, done)))
        job.start(number + 1)
        _note_resumption(job, number, done[-1])
    job.join()
    return done


def _choose(chance: random.Random) -> tuple[list[int], list[int]]:
    """The ranks to kill, and the nodes that lose their memory."""
    if chance.random() < _LOSES_ALL_MEMORY:
        return list(range(RANKS)), list(range(NODES))
    if chance.random() >= _LOSES_NODE:
        return [chance.randrange(RANKS)], []
    node, per_node = chance.randrange(NODES), RANKS // NODES
    ranks = list(range(node * per_node, (node + 1) * per_node))
    return ranks, [node] if chance.random() < _LOSES_ITS_MEMORY else []


def _saved(job: _Job, before: list[Kill]) -> dict[str, int]:
    """The newest step that all ranks have in each tier; steps newer than one that was restored since do not count."""
    newest = {"memory": 0, "storage": 0}
    copies: dict[str, Counter[int]] = {"partner": Counter(), "local": Counter()}
    for record in job.events("checkpoint_saved"):
        if any(record["step"] > kill.resumed_step for kill in before[record.generation :]):
            continue
        if record["tier"] in copies:
            copies[record["tier"]][record["step"]] += 1
        elif record["committed"]:
            newest[record["tier"]] = record["step"]
    for tier, steps in copies.items():
        newest[tier] = max((step for step, count in steps.items() if count >= RANKS), default=0)
    return newest


def _note_resumption(job: _Job, number: int, kill: Kill) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while True:
        starts = [record for record in job.events("run_started") if record.generation == number + 1]
        if len(starts) == RANKS:
            break
        if time.monotonic() > deadline or not any(process.is_alive() for process in job.processes):
            raise RuntimeError(f"no restart after kill {number} within {_LIMIT_S:g} s:\n{job.last_words(range(RANKS))}")
        time.sleep(0.05)
    kill.resumed_step = starts[0]["first_step"] - 1
    total: Counter[str] = Counter()
    for record in job.events("checkpoint_restored"):
        if record.generation == number + 1:
            total.update(record["tiers"])
    kill.tiers = dict(total)


def _same(one: Path, other: Path, step: int) -> bool:
    """Whether two runs' last checkpoints contain the same arrays, byte for byte."""
    groups = [zarr.open_group(run / "checkpoints" / f"step_{step:08d}", mode="r") for run in (one, other)]
    arrays = [dict(_arrays(group)) for group in groups]
    return arrays[0].keys() == arrays[1].keys() and all(
        arrays[0][name][:].tobytes() == arrays[1][name][:].tobytes() for name in arrays[0]
    )


def _arrays(group: Any) -> Any:
    return ((path, node) for path, node in group.members(max_depth=None) if isinstance(node, zarr.Array))


def _rank(config: str, place: Place, mounts: dict[str, str], log: str) -> None:
    """The main function of a rank's process."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for folder, at in mounts.items():
        mount_over(folder, at)
    os.environ.update(OMP_NUM_THREADS="1", **place.environ())
    import torch

    from outlast.config import load
    from outlast.trainer import Config, run_rank

    torch.set_num_threads(1)
    with suppress(KeyboardInterrupt):
        run_rank(load(Config, config), place)


if __name__ == "__main__":
    sys.exit(main())
