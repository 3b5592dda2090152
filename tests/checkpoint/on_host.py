"""One rank on an emulated host: checkpointers with a memory tier, and what comes of each; a line of JSON each."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from benchmarks.namespace import mount_over
from outlast.errors import CheckpointError
from outlast.events import CheckpointSaved, Event
from tests.checkpoint.helpers import QUICK, ToldByEvents
from tests.checkpoint.states import local, state


def main() -> None:
    """Arguments: the rank, a folder of the job's, this node's memory; then a JSON list of cases.

    A case is the MASTER_ADDR that this rank sees, and settings.
    """
    rank, folder, memory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    mount_over(memory, "/dev/shm")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for number, (master, settings) in enumerate(json.loads(sys.argv[4])):
        os.environ["MASTER_ADDR"] = master
        print(json.dumps(case(rank, f"{folder}/checkpoints{number}", settings)), flush=True)
        dist.barrier()
    os._exit(0)  # a checkpointer that one rank could not make leaves the other's waiting


def case(rank: int, url: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Save to both nodes' memory; where this rank listens, or the error."""
    events: list[Event] = []
    config = replace(QUICK, memory_every_steps=1, partner_every_steps=1, **settings)
    try:
        saver = ToldByEvents(url, config, rank=rank, world_size=2, attempt_id="one", on_event=events.append)
    except CheckpointError as error:
        return {"error": str(error)}
    assert saver._tiers is not None
    found = {"listens": saver._tiers.meeting.nodes.addresses[rank][0]}
    if not found["listens"].startswith("127."):
        with saver:
            saver.save(1, replicated=state(1), local=local(1, rank))
            saver.wait_copied()
            deadline = time.monotonic() + 60
            while not any(isinstance(event, CheckpointSaved) and event.tier == "partner" for event in events):
                assert time.monotonic() < deadline, events
                time.sleep(0.01)
    return found


if __name__ == "__main__":
    main()
