"""A pipeline over gloo: who waits in send or recv is seen, and so is the rank that they wait for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import clean_env, events, outlast

PIPELINE = """
import os, sys, time
import torch, torch.distributed as dist
from torch.distributed import recv  # a name of its own
dist.init_process_group("gloo")
rank, hangs = dist.get_rank(), sys.argv[1]
for step in range(20):
    if step == 9 and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        time.sleep(1000)
    there, back = torch.full((3,), float(step)), torch.empty(3)
    if hangs == "batch":
        ops = [dist.P2POp(dist.isend, there, 1 - rank), dist.P2POp(dist.irecv, back, 1 - rank)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
    elif rank == 0:
        dist.send(there, 1)
        recv(back, 1)
    else:
        recv(back, src=0)
        dist.send(there, dst=0)
    assert torch.equal(back, there)
print("rank", rank, "is done", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("how", ["plain", pytest.param("batch", marks=pytest.mark.soak)])
def test_a_rank_that_its_peer_waits_for_is_named(tmp_path: Path, how: str) -> None:
    script = tmp_path / "pipeline.py"
    script.write_text(PIPELINE)
    quick = ["--launch.hang-floor-s", "2", "--launch.monitor-interval-s", "0.2", "--launch.alone-limit-s", "2"]
    words = ["launch", "--nproc-per-node", "2", "--run-dir", tmp_path / "run", *quick, script, how]
    done = outlast(*words, env=clean_env())
    assert "rank 0 is done" in done.stdout
    (hang,) = events(tmp_path / "run", "hang_found")
    assert hang["culprit"] == 1
    assert "1 peer has been waiting" in hang["evidence"]
    assert "from 1 #" in hang["evidence"] or "to 1 #" in hang["evidence"]
