"""Finds its place, meets the others over gloo, and rank 0 prints what all found."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from outlast.launch import find_place

place = find_place()
os.environ.update(place.environ())
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
mine = torch.tensor([place.rank, place.local_rank, place.local_world_size, place.generation, place.master_port])
everyone = [torch.empty_like(mine) for _ in range(place.world_size)]
dist.all_gather(everyone, mine)
if place.rank == 0:
    print(place.source, place.master_addr, *(",".join(map(str, one.tolist())) for one in everyone), flush=True)
dist.destroy_process_group()
