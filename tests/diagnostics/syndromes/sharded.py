"""A sharded job (as FSDP2 runs it): parameters are gathered a layer ahead, gradients scattered in the background."""

from __future__ import annotations

import numpy as np

from outlast.diagnostics.syndromes.trace import RUNNING, Calls, Clocks, Job, Signs, Trace

OPS = ("_all_gather_base", "_reduce_scatter_base", "all_reduce")
LAYERS = 4
WORK_S = 0.08
TRANSFER_S = 0.02


def sharded_trace(
    seed: int, *, ranks: int = 8, steps: int = 30, slow: int | None = None, since: int = 15, factor: float = 1.6
) -> Trace:
    """Two ranks a node; one rank may compute for longer from a step on, in the backward pass only."""
    random = np.random.default_rng(seed)
    t = np.zeros(ranks)
    free = 0.0
    count = 0
    rows: list[tuple[int, int, int, int, int, float, float]] = []

    def call(op: int, nbytes: int, step: int, transfer_s: float) -> np.ndarray:
        nonlocal free, count
        done = max(float(t.max()), free) + transfer_s * random.lognormal(0, 0.1)
        free = done
        ends = done + random.uniform(0, 3e-4, ranks)
        rows.extend((rank, count, op, nbytes, step, float(t[rank]), float(ends[rank])) for rank in range(ranks))
        count += 1
        t[:] += 2e-4
        return ends

    for step in range(steps):
        for part in ("forward", "backward"):
            gathered = call(0, 1_000_000, step, TRANSFER_S)
            scattered = np.zeros(ranks)
            for layer in range(LAYERS):
                following = call(0, 1_000_000, step, TRANSFER_S) if layer < LAYERS - 1 else gathered
                t = np.maximum(t, gathered)
                work = WORK_S * random.lognormal(0, 0.03, ranks) * (2 if part == "backward" else 1)
                if slow is not None and step >= since and part == "backward":
                    work[slow] *= factor
                t = t + work
                gathered = following
                if part == "backward":
                    scattered = np.maximum(scattered, call(1, 1_000_000, step, TRANSFER_S))
            t = np.maximum(t, scattered)
        t = np.maximum(t, call(2, 4, step, 1e-3)) + 0.02
    rank, seq, op, nbytes, at_step, enter, done = (np.asarray(one) for one in zip(*rows, strict=True))
    zeros = np.zeros(len(rank), dtype=np.int64)
    nodes = ranks // 2
    calls = Calls(
        rank=rank,
        group=zeros,
        seq=seq,
        op=op,
        nbytes=nbytes,
        dtype=zeros,
        step=at_step,
        enter_s=enter,
        done_s=done,
        peer=zeros - 1,
        ops=OPS,
    )
    job = Job(
        nodes=tuple(f"node-{one}" for one in range(nodes)),
        node_of=np.arange(ranks) // 2,
        role_of=np.zeros(ranks, dtype=np.int64),
        groups=("0 default_pg",),
        members=(np.arange(ranks),),
    )
    signs = Signs(
        state=np.full(ranks, RUNNING),
        phase=np.full(ranks, "step"),
        step=np.full(ranks, steps - 1),
        beat_s=t.copy(),
        idle_s=np.zeros(ranks),
    )
    return Trace(job=job, calls=calls, signs=signs, clocks=Clocks.alike([float(t.max())] * nodes))
