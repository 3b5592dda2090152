"""What it means that the launchers of a job cannot meet, or cannot meet again."""

from __future__ import annotations

from torch.distributed import DistError
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousTimeoutError,
)

from outlast.errors import LaunchError
from outlast.launch.failures import first_line
from outlast.launch.rendezvous import Rendezvous
from outlast.launch.trusted_rendezvous import AuthenticatedHandler


def rendezvous_failed(error: Exception, rendezvous: Rendezvous, handler: RendezvousHandler) -> LaunchError:
    """What it means that the launchers cannot meet, or cannot meet again."""
    where = f"{rendezvous.endpoint} (id {rendezvous.run_id})"
    again = "once it is well, start the job again on all nodes: training goes on from the newest checkpoint"
    if isinstance(error, (RendezvousConnectionError, DistError)):
        return LaunchError(
            f"the rendezvous at {where} is lost: the launcher there has ended, its node has failed, or the link to it "
            f"is cut ({first_line(error.__cause__ or error)}); this node's ranks were ended",
            again,
        )
    if isinstance(error, RendezvousClosedError):
        return LaunchError(
            f"the rendezvous at {where} is closed: the job has ended on another node",
            "read that node's launcher for the cause; to start it again, start all nodes",
        )
    if isinstance(error, RendezvousTimeoutError) and isinstance(handler, AuthenticatedHandler) and handler.missing:
        fewer = f"--nnodes 1:{rendezvous.max_nodes} lets the others go on without a node"
        return LaunchError(
            f"too few nodes at the rendezvous at {where} in the time for it (--rdzv-conf join_timeout): "
            f"{handler.missing}",
            f"start the job again on all nodes, with the same endpoint, id and --nnodes; {fewer}",
        )
    return LaunchError(
        f"the rendezvous at {where} failed: {first_line(error)}",
        "make sure every node was started with the same endpoint, id and --nnodes, and can reach that host",
    )
