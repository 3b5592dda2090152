"""A rank under torchrun: joins the trainer's process group, averages, and is killed in all starts but the last."""

import os
import signal
import sys
from datetime import timedelta

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
if attempt < kills and place.rank == attempt % 2:
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
print(f"start {attempt} ended well")
