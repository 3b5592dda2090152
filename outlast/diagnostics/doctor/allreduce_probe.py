"""``python -m outlast.diagnostics.doctor.allreduce_probe RANK PORT RING``: one rank of the doctor's all-reduce.

Prints one JSON object: ``sum``, ``connect_s``, ``all_reduce_s``, ``recorded``.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from pathlib import Path

from outlast.diagnostics.live.recorder import Recorder, read_ring

ELEMENTS = 262_144
TIMEOUT_S = 45.0


def main(rank: int, port: int, ring: Path) -> None:
    """Connect to the other rank over 127.0.0.1 with gloo, sum 1 MiB of ones, and read this rank's recorder back."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    recorder = Recorder(ring, rank=rank, capacity=16)
    try:
        start_s = time.perf_counter()
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timeout)
        connected_s = time.perf_counter()
        ones = torch.ones(ELEMENTS)
        token = recorder.enter("all_reduce", ones.nbytes, "probe")
        dist.all_reduce(ones)
        recorder.complete(token)
        reduced_s = time.perf_counter()
        result = {
            "sum": float(ones.sum()),
            "connect_s": connected_s - start_s,
            "all_reduce_s": reduced_s - connected_s,
            "recorded": len(read_ring(ring).records) == 1 and not read_ring(ring).pending,
        }
        dist.destroy_process_group()
    finally:
        recorder.close()
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
