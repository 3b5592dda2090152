"""Two ranks that send and receive, compiled and not, with the waits noted and without; rank 1 prints what it saw."""

from __future__ import annotations

import json
import threading
import time

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch._dynamo.utils import counters

from outlast.diagnostics.live.point_to_point import install, issued, waiting

dist.init_process_group("gloo")
rank = dist.get_rank()


def exchange(x: torch.Tensor) -> torch.Tensor:
    x = x + 1
    work = dist.all_reduce(x, async_op=True)
    assert work is not None
    work.wait()
    back = torch.zeros(3)
    other = dist.isend(x, 1) if rank == 0 else dist.irecv(back, 0)
    assert other is not None
    other.wait()
    return x * 2 + back


def both() -> tuple[list[float], list[float], int]:
    torch._dynamo.reset()
    counters.clear()
    plain = exchange(torch.ones(3)).tolist()
    compiled = torch.compile(exchange, backend="eager")(torch.ones(3)).tolist()
    return plain, compiled, counters["frames"]["total"]


before = both()
install(c10d)
after = both()
seen: list[tuple[str, str, int]] = []
if rank == 0:
    time.sleep(0.5)
    dist.send_object_list([{"a": 1}], 1)
else:
    look = threading.Timer(0.25, lambda: seen.extend((one.op, one.group, one.nbytes) for one in waiting()))
    look.start()
    found: list[object] = [None]
    dist.recv_object_list(found, 0)
    look.join()
    assert found == [{"a": 1}]
    assert waiting() == ()
    assert issued() >= 4
    said = {"before": before[:2], "after": after[:2], "frames": [before[2], after[2]], "seen": seen}
    print(json.dumps(said), flush=True)
dist.barrier()
dist.destroy_process_group()
