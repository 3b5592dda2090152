"""Keys of one start's own, in a store that several starts of a job share.

torchrun hands the ranks that it restarts the store of the start before, in which gloo finds the addresses of ranks that
are dead. How often ranks were restarted is no name for a start: torchrun counts it on each node by itself.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping

from torch.distributed import DistStoreError, PrefixStore, Store  # type: ignore[attr-defined]

from outlast.launch.place import GENERATION

_PAUSE_S = 0.02


def of_this_start(
    store: Store, rank: int, world_size: int, timeout_s: float, environ: Mapping[str, str] | None = None
) -> PrefixStore:
    """The store, with keys that no other start of these ranks has. Collective over the ranks that start.

    Failure contract: DistStoreError within about ``timeout_s`` if a rank does not come.
    """
    environ = os.environ if environ is None else environ
    if environ.get(GENERATION):  # of outlast's launcher, the same on all nodes
        name = f"generation_{environ[GENERATION]}"
    elif environ.get("GROUP_WORLD_SIZE", "1") == "1":
        name = f"restart_{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    else:
        meeting = PrefixStore(f"outlast/meeting/{world_size}", store)
        name = _lead(meeting, world_size, timeout_s) if rank == 0 else _follow(meeting, rank, timeout_s)
    return PrefixStore(f"outlast/{name}/{world_size}", store)


def _lead(store: Store, world_size: int, timeout_s: float) -> str:
    """Rank 0 draws the name, and says it to the ranks that are there now, until all of them have heard it.

    What it finds may be of an earlier start, whose ranks draw other nonces; so it looks again and again.
    """
    name = secrets.token_hex(8)
    deadline = time.monotonic() + timeout_s
    missing = set(range(1, world_size))
    said = ""
    while missing:
        here = {rank: store.get(f"here_{rank}").decode() for rank in missing if store.check([f"here_{rank}"])}
        saying = json.dumps({"name": name, "to": sorted(here.values())})
        if saying != said:
            store.set("said", saying)
            said = saying
        missing = {rank for rank in missing if not store.check([f"heard_{name}_{rank}"])}
        _pause(deadline, f"rank 0 waits for ranks {sorted(missing)}")
    return name


def _follow(store: Store, rank: int, timeout_s: float) -> str:
    nonce = secrets.token_hex(8)
    store.set(f"here_{rank}", nonce)
    deadline = time.monotonic() + timeout_s
    while True:
        if store.check(["said"]):
            said = json.loads(store.get("said"))
            if nonce in said["to"]:
                store.set(f"heard_{said['name']}_{rank}", "1")
                return str(said["name"])
        _pause(deadline, f"rank {rank} waits for rank 0")


def _pause(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise DistStoreError(f"{what} of this start")
    time.sleep(_PAUSE_S)
