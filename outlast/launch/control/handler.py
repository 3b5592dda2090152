"""The control plane as a rendezvous of torchelastic: ``--rdzv-backend outlast``."""

from __future__ import annotations

import logging
import sys
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from outlast.launch.control.messages import Reply
from outlast.launch.control.node import ControlNode
from outlast.launch.ports import LOOPBACKS
from outlast.launch.trusted_rendezvous import loopback_store

log = logging.getLogger("outlast.launch")

LOOK_S = 0.5
"""Between two looks at whether waiting is over for another reason than a place."""
FIRST_S = 5.0
"""A wait that is shorter is nothing to write about."""
AGAIN_S = 60.0
"""Between two lines about one wait."""
STORE_S = 60.0
"""The first node's store answers within this time."""


class ControlHandler(RendezvousHandler):
    """torchelastic's view of a :class:`~outlast.launch.control.node.ControlNode`.

    Args:
        node: not started yet.
        run_id: of the job.
        ends_spares: raise ``SystemExit(0)`` for a launcher that was never needed: torchrun knows no such end.
    """

    def __init__(self, node: ControlNode, run_id: str, *, ends_spares: bool) -> None:
        self.spare = False
        """Whether the job has all its nodes without this launcher."""
        self._node = node
        self._run_id = run_id
        self._ends_spares = ends_spares
        self._started = False
        self._stopped = ""
        self._store: TCPStore | None = None

    def get_backend(self) -> str:
        return "outlast"

    def get_run_id(self) -> str:
        return self._run_id

    @property
    def use_agent_store(self) -> bool:
        """Ranks meet in the store of the first node's launcher."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """This node's place in the next generation; blocks until there is one.

        A spare waits for as long as the job runs. A node that is evicted waits to be readmitted.

        Raises:
            RendezvousTimeoutError: the job has too few nodes, for longer than ``join_s``.
            RendezvousClosedError: the job has ended without success.
            RendezvousGracefulExitError: it has ended with success; this node was not needed for it.
            LaunchError: the journal is another run's.
        """
        address = self._node.member.address
        offer = loopback_store(timeout_s=STORE_S) if address in LOOPBACKS else _server()
        self._node.ask_place(store_port=offer.port, reason=self._stopped or "its ranks have ended")
        if not self._started:
            self._node.start()
            self._started = True
        self._stopped, self.spare = "", False
        while True:
            reply = self._await_place()
            try:
                store = offer if reply.rank == 0 else _connect(reply)
                break
            except RendezvousConnectionError as error:  # that node has failed since; the next generation goes without
                log.warning("outlast: %s", error)
                self._node.ask_place(store_port=offer.port, reason=str(error))
        self._store = store  # its server lives as long as this
        prefixed = PrefixStore(f"outlast/{self._run_id}/{reply.generation}", store)
        where = RendezvousStoreInfo(reply.address, reply.port)
        return RendezvousInfo(prefixed, reply.rank, reply.nodes, where)

    def num_nodes_waiting(self) -> int:
        """1 if this node's ranks must be stopped, so that torchelastic asks for the next generation; else 0."""
        why = self._node.why_stop()
        if why and why != self._stopped:
            self._stopped = why
            log.warning("outlast: this node's ranks are stopped: %s", why)
        return int(bool(why))

    def is_closed(self) -> bool:
        newest = self._node.newest
        return newest is not None and bool(newest.done)

    def set_closed(self) -> None:
        """Nothing: the job ends when its nodes have left, not when one of them says so."""

    def shutdown(self) -> bool:
        """This launcher leaves, which is not the job's end. An exception that is on its way says that ranks failed."""
        error = sys.exception()
        self.leave(error is None or (isinstance(error, SystemExit) and error.code in (0, None)), _ending(error))
        return True

    def leave(self, succeeded: bool, reason: str) -> None:
        """Tell the others that this launcher ends, and how its ranks did."""
        if self._started:
            self._node.leave(succeeded=succeeded, reason=reason)

    def _await_place(self) -> Reply:
        began_s = time.monotonic()
        told_s, spare_since_s = began_s + FIRST_S - AGAIN_S, 0.0
        limit_s = self._node.settings.join_s
        while True:
            reply = self._node.assignment(LOOK_S)
            if reply is not None:
                return reply
            newest, now_s = self._node.newest, time.monotonic()
            if newest is not None and self._node.has_ended:
                self._end(newest)
            running = newest is not None and newest.generation != -1 and not newest.over and not self._node.is_cut_off
            evicted = newest is not None and newest.evicted
            if running or evicted:
                began_s = now_s
            if running and not evicted and not self.spare and newest is not None:
                spare_since_s = spare_since_s or now_s
                if now_s - spare_since_s > 1.0:
                    self.spare = True
                    log.warning(
                        "outlast: the job has all its %d nodes; this launcher is a spare, and waits until one of them "
                        "is lost or the job ends",
                        newest.nodes,
                    )
            if now_s - began_s > limit_s:
                raise RendezvousTimeoutError(f"no place in the job within {limit_s:g} s: {self._why_waiting()}")
            if now_s - told_s > AGAIN_S and not self.spare:
                told_s = now_s
                log.warning("outlast: waiting at %s: %s", self._node.meeting.place, self._why_waiting())

    def _why_waiting(self) -> str:
        newest = self._node.newest
        if newest is not None and newest.evicted:
            return f"this node is evicted: {newest.evicted}"
        if newest is not None and newest.told:
            return newest.told
        return self._node.error or "the launcher that leads has not been found yet"

    def _end(self, newest: Reply) -> None:
        if not newest.succeeded:
            raise RendezvousClosedError(f"the job has ended: {newest.done}")
        if self._ends_spares:
            log.warning("outlast: the other nodes finished the job before this one was needed")
            raise SystemExit(0)
        raise RendezvousGracefulExitError("the other nodes finished the job before this one was needed")


def _ending(error: BaseException | None) -> str:
    if error is None:
        return ""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _server() -> TCPStore:
    """A store for the next generation. torch's listens on all interfaces, and knows no secret."""
    return TCPStore(
        "0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=STORE_S), multi_tenant=False
    )


def _connect(reply: Reply) -> TCPStore:
    try:
        return TCPStore(
            reply.address, reply.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=STORE_S)
        )
    except dist.DistError as error:
        raise RendezvousConnectionError(
            f"the store of the first node, {reply.address}:{reply.port}, does not answer: {error}"
        ) from error
