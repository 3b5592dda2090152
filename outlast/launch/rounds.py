"""What the launchers of a job agree on in each round of the rendezvous."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import WorkerGroup
from torch.distributed.elastic.rendezvous import RendezvousHandler
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from outlast.launch.notice_store import NoticeStore
from outlast.launch.program_runs import ProgramRuns

STARTS = "starts"
"""Key of the job in the rendezvous store that counts how often its ranks were started."""
JOB_NAME = "job"
"""Key of the job in the rendezvous store of a name that no other job has."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """A round of the rendezvous, the same on all nodes."""

    generation: int
    """How often the job's ranks were started before, over requeues too."""
    job: str
    """The job's name, which no other has."""
    variables: dict[str, str] = field(default_factory=dict)
    """For ranks that run somebody's program."""
    notices: NoticeStore | None = None
    """Where launchers hear of notices; None on a single node."""
    store: dist.Store | None = None  # type: ignore[name-defined]
    """Of all launchers; it outlives rounds. None on a single node."""


def forget_store(handler: RendezvousHandler) -> None:
    """Have the next round make a fresh store for the ranks.

    torchelastic reuses that of the first round. Restarted ranks would then read the addresses of their dead
    predecessors from it, and gloo would fail with "Connection refused".
    """
    if isinstance(handler, DynamicRendezvousHandler):
        handler._bootstrap_store_info = None
        handler._shared_tcp_store_server = None


def agree(worker_group: WorkerGroup, *, requeues: int, program_runs: ProgramRuns | None) -> Round:
    """Agree on the starts and on the job's name. Collective over the agents of the job, right after a rendezvous.

    Node 0 of the round counts the starts in the store that outlives rounds, and hands the number to the others through
    the round's own store; likewise the job's name, which the first round draws.

    Args:
        worker_group: torchelastic's, with the round's store.
        requeues: how often a scheduler has started the job before.
        program_runs: numbers the starts of somebody's program; None for a command that does so itself.
    """
    store = worker_group.store
    assert isinstance(store, dist.PrefixStore)  # type: ignore[attr-defined]
    leads = worker_group.group_rank == 0
    if leads:
        prefix = f"outlast/{worker_group.spec.rdzv_handler.get_run_id()}"  # jobs may share an endpoint
        lasting = dist.PrefixStore(prefix, store.underlying_store)
        store.set(JOB_NAME, lasting.compare_set(JOB_NAME, "", secrets.token_hex(8)))
        store.set(STARTS, str(lasting.add(STARTS, 1) - 1))
    job = store.get(JOB_NAME).decode()
    generation = requeues + int(store.get(STARTS))
    variables = {} if program_runs is None else program_runs.agree(store, job=job, generation=generation, leads=leads)
    several = worker_group.group_world_size != 1
    lasting = store.underlying_store if several else None
    notices = NoticeStore(lasting, generation) if lasting is not None else None
    return Round(generation=generation, job=job, variables=variables, notices=notices, store=lasting)
