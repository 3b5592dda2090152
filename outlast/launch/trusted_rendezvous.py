"""torchelastic's dynamic rendezvous, with nothing unpickled that does not carry the run's MAC, and never too few nodes.

torchelastic keeps its state as a pickle in a store that has no notion of who may write, and whose server listens on all
interfaces. Whoever reaches that port could have code run in each launcher. Here every state is authenticated with the
run's secret (HMAC-SHA256, FIPS 198-1) before torchelastic reads it; and the stores of a job on one node listen on
loopback alone.

What remains open to those who reach the port of a job of several nodes: torch's store itself, in which they can change
or delete keys, so that the job fails. The traffic is not encrypted.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import stat
from datetime import timedelta
from pathlib import Path

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend, create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousBackend,
    RendezvousSettings,
    RendezvousTimeout,
    Token,
)

from outlast.errors import LaunchError
from outlast.launch.joining import JoiningHolder
from outlast.launch.ports import LOOPBACKS, fail_when_silent, loopback, sockets_of
from outlast.launch.sealed import Seal
from outlast.plain_text import plain_text

SECRET = "OUTLAST_LAUNCH_SECRET"
"""Environment variable with the run's secret, for launchers that do not share the run's directory."""
SECRET_FILE = "launch.secret"
"""In the run's directory otherwise; its mode is 0600."""
OWNER = "outlast/owner"
"""Key in a rendezvous' store of the id of the job that made it."""
SILENT_S = 30.0
"""A store that does not answer for this long is lost. Twice as long as a node may be silent."""
_LEAST_SECRET_BYTES = 16

log = logging.getLogger("outlast.launch")


class AuthenticatedBackend(RendezvousBackend):
    """A backend whose states carry a MAC. One without it is replaced by the newest state that was seen with one.

    Args:
        inner: holds the states.
        secret: of the run, the same on all nodes.
        run_id: of the rendezvous; a state of another is not accepted.
    """

    def __init__(self, inner: RendezvousBackend, secret: bytes, run_id: str) -> None:
        self._inner = inner
        self._seal = Seal(secret, f"outlast rendezvous\0{run_id}")
        self._newest: bytes | None = None

    @property
    def name(self) -> str:
        """As torchelastic records it."""
        return self._inner.name

    def get_state(self) -> tuple[bytes, Token] | None:
        """The state and its fencing token; None if there is none yet.

        Raises:
            RendezvousStateError: what is there has no MAC of this run, and nothing with one was seen before.
            RendezvousConnectionError: the store is lost.
        """
        found = self._inner.get_state()
        return None if found is None else self._checked(*found)

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        """Write ``state`` if the token is still current; returns what is there now, and whether it is ``state``.

        Raises:
            RendezvousStateError, RendezvousConnectionError: as :meth:`get_state`.
        """
        result = self._inner.set_state(self._seal.seal(state), token)
        if result is None:
            return None
        now, new_token, written = result
        if written:
            self._newest = state
            return state, new_token, True
        return *self._checked(now, new_token), False

    def _checked(self, sealed: bytes, token: Token) -> tuple[bytes, Token]:
        state = self._seal.open(sealed)
        if state is None:
            log.error("outlast: the rendezvous holds a state without this run's MAC; it is not read")
            if self._newest is not None:  # otherwise anyone could end the job
                result = self._inner.set_state(self._seal.seal(self._newest), token)
                if result is not None and (state := self._seal.open(result[0])) is not None:
                    token = result[1]
        if state is None:
            raise RendezvousStateError(
                "its state was not written with this run's secret: another run uses the same endpoint and id, somebody "
                f"interferes, or the nodes have different secrets (they share the run's directory, or all set {SECRET})"
            )
        self._newest = state
        return state, token


class AuthenticatedHandler(DynamicRendezvousHandler):
    """torchelastic's, with some differences: see the methods."""

    loopback = False

    @property
    def missing(self) -> str:
        """Which nodes were here when this launcher last waited for others, and which were not; empty if it has not."""
        holder = self._state_holder
        return holder.missing if isinstance(holder, JoiningHolder) else ""

    @property
    def spare(self) -> bool:
        """Whether this launcher was told that the job has all its nodes without it."""
        holder = self._state_holder
        return isinstance(holder, JoiningHolder) and holder.spare

    def _create_tcp_store_server(self, master_addr: str, port: int) -> TCPStore:
        """The ranks' store; it listens on loopback if the job has one node."""
        if self.loopback:
            return loopback_store(port)
        store: TCPStore = super()._create_tcp_store_server(master_addr, port)
        return store

    def next_rendezvous(self) -> RendezvousInfo:
        """The next round.

        Raises:
            RendezvousError: as torchelastic's; also if the round has fewer nodes than the job's minimum.
        """
        info = super().next_rendezvous()
        if info.world_size < self.settings.min_nodes:
            raise RendezvousStateError(
                f"the round has {info.world_size} nodes, at least {self.settings.min_nodes} are needed"
            )
        return info


def loopback_store(port: int = 0, timeout_s: float = 300.0) -> TCPStore:
    """A store whose server listens on loopback alone; torch's own constructor listens on all interfaces."""
    address = loopback()
    with socket.create_server((address, port), family=LOOPBACKS[address], backlog=socket.SOMAXCONN) as listener:
        port = listener.getsockname()[1]
        return TCPStore(
            address,
            port,
            is_master=True,
            multi_tenant=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=os.dup(listener.fileno()),  # the store closes it
        )


def dynamic_handler(params: RendezvousParameters, run_dir: Path) -> AuthenticatedHandler:
    """torchelastic's handler for its ``c10d`` backend, authenticated.

    Raises:
        RendezvousError: as torchelastic's.
        ValueError: a number of ``--rdzv-conf`` is not positive.
        LaunchError: the run's secret cannot be read or made.
    """
    alone = params.max_nodes == 1
    backend: RendezvousBackend
    store: Store
    if alone and params.endpoint in ("127.0.0.1:0", "[::1]:0"):
        secret = secrets.token_bytes(32)  # nobody else needs it
        store = loopback_store(timeout_s=_number(params, "read_timeout", 60))
        backend = C10dRendezvousBackend(store, params.run_id)
    else:
        secret = run_secret(run_dir)
        backend, store = create_backend(params)
        if isinstance(store, TCPStore):
            for fd in sockets_of(store.port):
                fail_when_silent(fd, SILENT_S)
        _tell_owner(store, params)

    def seconds(key: str) -> timedelta | None:
        value = params.get_as_int(f"{key}_timeout")
        return None if value is None else timedelta(seconds=value)

    settings = RendezvousSettings(
        params.run_id,
        params.min_nodes,
        params.max_nodes,
        RendezvousTimeout(seconds("join"), seconds("last_call"), seconds("close"), seconds("heartbeat")),
        keep_alive_interval=timedelta(seconds=_number(params, "keep_alive_interval", 5)),
        keep_alive_max_attempt=_number(params, "keep_alive_max_attempt", 3),
    )
    backend = AuthenticatedBackend(backend, secret, params.run_id)
    node = AuthenticatedHandler._node_desc_generator.generate(params.local_addr)
    holder = JoiningHolder(backend, settings, node, params.endpoint)
    handler = AuthenticatedHandler(node, settings, backend.name, store, holder)
    handler.loopback = alone and params.local_addr in LOOPBACKS
    return handler


def _tell_owner(store: Store, params: RendezvousParameters) -> None:
    """Say so if the store is in the launcher of another job: this one ends with that one."""
    if not isinstance(store, TCPStore):
        return
    owner = store.compare_set(OWNER, "", params.run_id).decode(errors="replace")
    if owner != params.run_id:
        log.warning(
            "outlast: the store at %s is in a launcher of another job (id %s): when that job ends, this one (id %s) "
            "ends too; give it another --rdzv-endpoint",
            params.endpoint,
            plain_text(owner),
            params.run_id,
        )


def _number(params: RendezvousParameters, key: str, default: int) -> int:
    """One of ``--rdzv-conf``; raises ValueError unless it is positive."""
    value = params.get_as_int(key, default)
    if value is None or value <= 0:
        raise ValueError(f"--rdzv-conf {key}={value} is not positive")
    return value


def run_secret(run_dir: Path) -> bytes:
    """The run's secret: of the environment, or of the run's directory, where the first launcher makes it.

    Raises:
        LaunchError: it is too short, or others may read its file.
    """
    given = os.environ.get(SECRET)
    if given is not None:
        if len(given.encode()) < _LEAST_SECRET_BYTES:
            raise LaunchError(
                f"{SECRET} has {len(given.encode())} bytes",
                f"give every node the same {_LEAST_SECRET_BYTES} bytes or more, e.g. of `openssl rand -hex 32`",
            )
        return given.encode()
    path = run_dir / SECRET_FILE
    try:
        if not path.exists():
            _make(path)
        facts = path.lstat()
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
            raise LaunchError(
                f"{path} is no secret: owner {facts.st_uid}, mode {stat.filemode(facts.st_mode)}, this user is "
                f"{os.geteuid()}",
                f"make it a file of this user's with mode 0600, remove it, or set {SECRET} on all nodes",
            )
        return bytes.fromhex(path.read_text())
    except (OSError, ValueError) as error:
        raise LaunchError(
            f"the run's secret {path} cannot be read or made: {error}", f"or set {SECRET} on all nodes"
        ) from error


def _make(path: Path) -> None:
    """Whole or not at all: of launchers that start together, one makes it."""
    mine = path.with_name(f".{path.name}-{socket.gethostname()}-{os.getpid()}")
    handle = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(handle, secrets.token_hex(32).encode())
        os.fsync(handle)
    finally:
        os.close(handle)
    try:
        os.link(mine, path)
    except FileExistsError:
        pass
    finally:
        mine.unlink()
