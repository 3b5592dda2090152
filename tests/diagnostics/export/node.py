"""The events of a node, written as a launcher and two ranks write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from outlast.events import Record

STEP = {
    "loss": 2.0,
    "grad_norm": 1.5,
    "lr": 0.1,
    "tokens": 64,
    "step_s": 0.2,
    "data_s": 0.01,
    "comm_s": 0.02,
    "checkpoint_s": 0.03,
    "collective_s": 0.05,
    "codec_s": 0.001,
    "wire_bytes": 100,
    "dense_bytes": 4000,
}


class Node:
    """Writes events with times of its own."""

    def __init__(self, run: Path, host: str = "h1") -> None:
        self.run = run
        self.agent = run / "events" / f"agent_{host}.jsonl"
        self.agent.parent.mkdir(parents=True, exist_ok=True)
        self.agent.touch()
        self.generation = 0
        self.attempt = 1

    def rank_file(self, rank: int) -> Path:
        path = self.run / "attempts" / f"{self.attempt:04d}" / "events" / f"rank_{rank:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def told(self, t: float, kind: str, rank: int = -1, **fields: Any) -> None:
        path = self.agent if rank < 0 else self.rank_file(rank)
        line = {"v": 1, "t": t, "rank": rank, "generation": self.generation, "kind": kind, **fields}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def started(self, t: float, ranks: tuple[int, ...] = (0, 1)) -> None:
        self.told(t, "workers_started", host="h1", ranks=ranks, pids=[1] * len(ranks), restarts_left=3)
        for rank in ranks:
            self.told(t + 0.5, "run_started", rank, attempt=self.attempt, host="h1", device="cpu", comm="ef21 topk")

    def step(self, t: float, step: int, ranks: tuple[int, ...] = (0, 1), **fields: Any) -> None:
        for rank in ranks:
            self.told(t, "step", rank, step=step, **{**STEP, **fields})


def record(t: float, kind: str, rank: int = -1, generation: int = 0, **fields: Any) -> Record:
    return Record(t=t, rank=rank, generation=generation, kind=kind, fields=fields)
