"""From an endpoint to a handler: where a job's launchers meet."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from outlast.checkpoint.peers.addresses import is_loopback, routed_to
from outlast.checkpoint.storage.local import LocalStore
from outlast.checkpoint.storage.open import open_store
from outlast.errors import ConfigError
from outlast.launch.control.board import MemoryBoard, SealedBoard, StoreBoard
from outlast.launch.control.handler import ControlHandler
from outlast.launch.control.identity import node_order, this_member
from outlast.launch.control.meeting import Meeting
from outlast.launch.control.node import ControlNode
from outlast.launch.control.settings import settings_from
from outlast.launch.ports import is_free, is_own_address
from outlast.launch.trusted_rendezvous import SECRET, run_secret
from outlast.plain_text import plain_text

FOLDER = "control"
"""Below the endpoint's folder."""


def control_handler(
    endpoint: str,
    run_id: str,
    *,
    least: int,
    most: int,
    conf: Mapping[str, object],
    local_addr: str | None,
    run_dir: Path | None = None,
    ends_spares: bool = False,
) -> ControlHandler:
    """A rendezvous by outlast's control plane.

    Args:
        endpoint: a folder or URL that all nodes reach, or ``HOST:PORT`` of the launcher that leads.
        run_id: of the job. Two jobs at one endpoint need two.
        least: nodes that it needs.
        most: nodes that it has if it can; further ones are spares.
        conf: see :mod:`~outlast.launch.control.settings`; and ``is_host``, as for torch's ``c10d``.
        local_addr: where other nodes reach this one; None: found out.
        run_dir: of the run, where its secret is; None: in the endpoint's folder, or in the environment.
        ends_spares: see :class:`~outlast.launch.control.handler.ControlHandler`.

    Raises:
        ConfigError: the endpoint, or an option, is wrong.
        LaunchError: there is no secret.
        OSError: the endpoint cannot be reached.
    """
    options = dict(conf)
    is_host = options.pop("is_host", None)
    settings = settings_from(options, least=least, most=most)
    run_id = run_id or "none"
    if "/" in run_id or run_id.startswith("."):
        raise ConfigError(f"--rdzv-id {run_id!r} has a slash, or begins with a dot", "it names a folder: use letters")
    host_and_port = _host_and_port(endpoint)
    if host_and_port is not None:
        meeting = _fixed(host_and_port, run_id, is_host, run_dir)
    else:
        meeting = _shared(endpoint, run_id, run_dir)
    address = _address(local_addr, meeting)
    node = ControlNode(meeting, this_member(address), settings, order=node_order())
    return ControlHandler(node, run_id, ends_spares=ends_spares)


def _host_and_port(endpoint: str) -> tuple[str, int] | None:
    """Of an endpoint that is neither a path nor a URL."""
    if "/" in endpoint:
        return None
    host, colon, port = endpoint.rpartition(":")
    if not colon:
        return None
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"--rdzv-endpoint {endpoint!r} is neither HOST:PORT nor a folder",
            "give HOST:PORT with a port of 1 to 65535, or a path with a slash in it",
        )
    return host.strip("[]"), int(port)


def _fixed(where: tuple[str, int], run_id: str, is_host: object, run_dir: Path | None) -> Meeting:
    """One launcher has the journal in its memory; the job ends with it."""
    if run_dir is None and SECRET not in os.environ:
        raise ConfigError(
            f"the launchers at {where[0]}:{where[1]} have no secret",
            f"set {SECRET} to the same 16 bytes or more on all nodes, or let them meet in a folder",
        )
    secret = run_secret(run_dir if run_dir is not None else Path())
    if is_host is None:
        leads = is_own_address(where[0]) and is_free(where[1])
    else:
        leads = str(is_host).lower() in ("1", "true", "t", "yes", "y")
    place = f"{where[0]}:{where[1]}"
    board = SealedBoard(MemoryBoard(place), secret, run_id) if leads else None
    return Meeting(secret=secret, board=board, fixed=where, leads=leads)


def _shared(endpoint: str, run_id: str, run_dir: Path | None) -> Meeting:
    if not endpoint:
        raise ConfigError(
            "--rdzv-backend outlast has no endpoint",
            "give --rdzv-endpoint a folder or URL that all nodes reach, or HOST:PORT",
        )
    store = open_store(endpoint)
    store.check()
    store.prepare()
    if isinstance(store, LocalStore):
        secret = run_secret(run_dir if run_dir is not None and SECRET not in os.environ else Path(store.root))
    else:
        if SECRET not in os.environ and run_dir is None:
            raise ConfigError(
                f"the launchers at {plain_text(endpoint)} have no secret",
                f"set {SECRET} to the same 16 bytes or more on all nodes",
            )
        secret = run_secret(run_dir if run_dir is not None else Path())
    board = SealedBoard(StoreBoard(store, f"{FOLDER}/{run_id}"), secret, run_id)
    return Meeting(secret=secret, board=board)


def _address(local_addr: str | None, meeting: Meeting) -> str:
    """Where other nodes reach this one."""
    if local_addr:
        return socket.gethostbyname(local_addr) if not _is_number(local_addr) else local_addr
    if meeting.fixed is not None:
        return meeting.fixed[0] if meeting.leads and _is_number(meeting.fixed[0]) else routed_to(meeting.fixed[0])
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    if not is_loopback(address):
        return address
    try:  # Debian's own name leads to loopback; no packet is sent
        return routed_to("192.0.2.1")
    except OSError:
        return address


def _is_number(host: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return True
    return False
