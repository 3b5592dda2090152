"""A rank under torchrun: joins the trainer's process group, averages, and is killed in all starts but the last."""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from outlast.launch import find_place
from outlast.session.process_group import start

kills = int(sys.argv[1])
place = find_place()
start(place, torch.device("cpu"), timedelta(seconds=30))
total = torch.ones(1)
dist.all_reduce(total)
assert total.item() == place.world_size
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if len(sys.argv) > 2:  # of the job, not of this node
    attempt = len(list(Path(sys.argv[2]).iterdir()))
    dist.barrier()
if attempt < kills and place.rank == attempt % 2:
    if len(sys.argv) > 2:
        Path(sys.argv[2], str(attempt)).touch()
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
print(f"start {attempt} ended well")
