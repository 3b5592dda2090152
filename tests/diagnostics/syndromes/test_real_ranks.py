"""Three real ranks over gloo, one of them slow inside backward: told from their rings, not from how long steps last."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from outlast.diagnostics.live import observe
from outlast.diagnostics.syndromes.analyse import analyse
from outlast.diagnostics.syndromes.from_live import NodeView, trace_of
from outlast.diagnostics.syndromes.meetings import meetings_of
from outlast.diagnostics.syndromes.steps import step_times
from outlast.diagnostics.syndromes.waits import waits_of
from outlast.free_port import free_port
from tests.diagnostics.conftest import Spawn

RANK = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from outlast.diagnostics.live import Heartbeat, Recorder, heartbeat_path, ring_path

torch.set_num_threads(1)
folder, rank, port, slow = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
dist.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3, timeout=timedelta(seconds=60)
)
recorder, beat = Recorder(ring_path(folder, rank), rank=rank), Heartbeat(heartbeat_path(folder, rank), rank=rank)
buckets, loss = [torch.zeros(50_000) for _ in range(3)], torch.zeros(1)
for step in range(40):
    recorder.step = step
    beat.beat("step", step)
    time.sleep(0.01)
    works = []
    for bucket in buckets:
        time.sleep(0.01 + (slow if rank == 1 and step >= 20 else 0.0))
        token = recorder.enter("all_reduce", bucket.nbytes, "gradients")
        works.append(dist.all_reduce(bucket, async_op=True))
        works[-1].get_future().then(lambda _, token=token: recorder.complete(token))
    for work in works:
        work.wait()
    token = recorder.enter("all_reduce", loss.nbytes, "loss")
    dist.all_reduce(loss)
    recorder.complete(token)
print("done", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize(
    "slow_s", [pytest.param(0.0, marks=pytest.mark.soak), pytest.param(0.02, marks=pytest.mark.slow)]
)
def test_a_rank_that_is_slow_in_backward_is_seen(shm: Path, spawn: Spawn, slow_s: float) -> None:
    port = free_port()
    ranks = [spawn(RANK, shm, rank, port, slow_s) for rank in range(3)]
    for one in ranks:
        assert one.stdout is not None
        assert one.stdout.readline() == "done\n"
    seen = [observe(shm, rank=rank, pid=one.pid, started_s=0.0) for rank, one in enumerate(ranks)]
    trace = trace_of([NodeView(node="a", now_s=time.monotonic(), ranks=seen)], world_size=3)
    said = analyse(trace)
    if not slow_s:
        assert [one for one in said if one.confidence != "weak"] == []
        return
    (verdict,) = said
    assert (verdict.syndrome, verdict.culprit.ranks) == ("non_communication_slow", (1,)), verdict
    assert verdict.step is not None
    assert abs(verdict.step - 20) <= 2
    times = step_times(trace, waits_of(trace, meetings_of(trace), node_silent_s=8.0).flow)
    step_s = np.nanmedian(times.step_s[:, 22:], axis=1)
    assert step_s.max() / step_s.min() < 1.1  # the wall time of its steps does not tell
