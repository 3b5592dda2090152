"""A run in which a rank hangs while its peers wait for it in a collective that it never entered."""

from __future__ import annotations

import json
from pathlib import Path

from outlast.diagnostics.live.kept import CollectivesKept, KeptRow
from outlast.diagnostics.monitor import NodeClock
from outlast.events import EventLog
from tests.diagnostics.report.synthetic import SyntheticRun

CULPRIT = 2


def hanging(
    run_dir: Path, *, ranks: int = 4, steps: int = 30, ahead_s: float = 0.0, **settings: object
) -> SyntheticRun:
    """Rank 2, on node-b, hangs after two thirds of the steps; the clock of node-b is ``ahead_s`` ahead of node-a's."""
    run = SyntheticRun(run_dir=run_dir, ranks=ranks, steps=steps, **settings)  # type: ignore[arg-type]
    run.start()
    stop = steps * 2 // 3
    run.train(1, stop)
    for rank, host in enumerate(run.hosts()):
        began_t = run.t + 0.2
        rows: list[KeptRow] = [
            (
                seq,
                "all_reduce",
                "",
                4096,
                stop,
                began_t - 0.01 * (40 - seq),
                began_t - 0.01 * (40 - seq) + 0.015,
                "0",
                seq + 1,
            )
            for seq in range(40)
        ]
        if rank != CULPRIT:
            rows.append((40, "all_reduce", "", 4096, stop + 1, began_t, None, "0", 41))
        kept = CollectivesKept(of_rank=rank, pid=1000 + rank, entered=len(rows), newest=tuple(rows))
        folder = run.run_dir / "events" / f"agent_{host}.jsonl"
        with EventLog(folder, rank=-1, generation=0) as log:
            run.write(log, kept, run.t + 10.3)
    run.fail(CULPRIT, generation=0, step=stop + 1, hang=True)
    run.start(generation=1, first_step=stop // 10 * 10 + 1)
    run.train(stop // 10 * 10 + 1, steps)
    run.end()
    if ahead_s:
        _set_clock(run, ahead_s)
    return run


def _set_clock(run: SyntheticRun, ahead_s: float) -> None:
    """Rewrite what node-b wrote, as its clock would have had it, and tell how far it is ahead."""
    paths = [run.run_dir / "events" / "agent_node-b.jsonl"]
    paths += [path for rank in (2, 3) for path in run.run_dir.glob(f"attempts/*/events/rank_{rank:05d}.jsonl")]
    for path in paths:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line["t"] += ahead_s
            for row in line.get("newest", ()):
                row[5] += ahead_s
                row[6] = None if row[6] is None else row[6] + ahead_s
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.launcher(NodeClock(host="node-b", node=1, ahead_s=ahead_s, error_s=0.001), generation=0, host="node-b")
