"""The rendezvous of the launchers of all nodes, from flags and the environment."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from outlast.config import nearest
from outlast.errors import ConfigError, UnknownKey
from outlast.launch import slurm as slurm_names
from outlast.launch.flags import DEFAULT_PORT, LaunchFlags
from outlast.launch.place import Slurm
from outlast.launch.ports import loopback


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """How the launchers of all nodes find one another: torchelastic's parameters."""

    backend: str
    endpoint: str
    """``HOST:PORT``; port 0 chooses a free one."""
    run_id: str
    conf: Mapping[str, str]
    min_nodes: int
    max_nodes: int
    local_addr: str | None
    why: str
    """Where the endpoint comes from, as text for people."""

    def host_and_port(self) -> tuple[str, int]:
        """The endpoint's host and port; -1 if it has no port.

        Raises:
            ConfigError: the port is not a number of at most 65535.
        """
        host, _, port = self.endpoint.rpartition(":")
        if not host:
            return self.endpoint, -1
        if not port.isdecimal() or int(port) > 65535:
            raise ConfigError(
                f"--rdzv-endpoint {self.endpoint!r} has no port", "give HOST:PORT, with a port of at most 65535"
            )
        return host.strip("[]"), int(port)


def resolve(flags: LaunchFlags, environ: Mapping[str, str] | None = None) -> Rendezvous:
    """The rendezvous that ``flags`` define in this environment.

    Raises:
        ConfigError: several nodes without an endpoint, or an endpoint that cannot be parsed.
        PlaceError: under srun, the first node's address is unknown.
    """
    environ = os.environ if environ is None else environ
    least, most = flags.node_range()
    conf = _read_conf(flags.rdzv_conf, flags.rdzv_backend)
    run_id = flags.rdzv_id
    local_addr = flags.local_addr
    if flags.standalone or (
        most == 1 and not flags.rdzv_endpoint and not flags.master_addr and flags.rdzv_backend == "c10d"
    ):
        if flags.standalone and most != 1:
            raise ConfigError(f"--standalone and --nnodes {flags.nnodes} contradict each other", "remove one of them")
        # The loopback address also works where the host's name does not resolve.
        address = loopback()
        return Rendezvous(
            backend="c10d",
            endpoint=f"[{address}]:0" if ":" in address else f"{address}:0",
            run_id=run_id or uuid.uuid4().hex[:12],
            conf=conf,
            min_nodes=1,
            max_nodes=1,
            local_addr=local_addr or address,
            why="single node, free port",
        )
    endpoint, why = flags.rdzv_endpoint, "--rdzv-endpoint"
    if not endpoint and (flags.master_addr or flags.rdzv_backend == "static"):
        endpoint, why = f"{flags.master_addr or '127.0.0.1'}:{flags.master_port}", "--master-addr and --master-port"
        if flags.rdzv_backend == "c10d" and flags.node_rank is not None and most > 1:
            conf.setdefault("is_host", str(flags.node_rank == 0))
            if flags.node_rank == 0 and local_addr is None:
                local_addr = flags.master_addr  # where others reach this node, whatever its host name leads to
    slurm = Slurm()
    if slurm.is_present(environ):
        if not endpoint:
            place = slurm.find(environ)
            endpoint, why = (
                f"{place.master_addr}:{place.master_port}",
                "first node of the Slurm step, port computed from its id",
            )
            conf.setdefault("is_host", str(place.rank == 0))
        run_id = run_id or f"slurm-{environ['SLURM_JOB_ID']}-{environ.get('SLURM_STEP_ID', '0')}"
        if local_addr is None and environ.get("SLURMD_NODENAME"):
            local_addr = slurm_names.node_address(environ["SLURMD_NODENAME"])
    if not endpoint:
        raise ConfigError(
            f"--nnodes {flags.nnodes} needs a rendezvous endpoint",
            f"give every node the same --rdzv-endpoint HOST:PORT, e.g. --rdzv-endpoint FIRST_NODE:{DEFAULT_PORT}",
        )
    if flags.rdzv_backend == "static":
        conf.setdefault("rank", str(flags.node_rank or 0))
    rendezvous = Rendezvous(
        backend=flags.rdzv_backend,
        endpoint=endpoint,
        run_id=run_id or "outlast",
        conf=conf,
        min_nodes=least,
        max_nodes=most,
        local_addr=local_addr,
        why=why,
    )
    rendezvous.host_and_port()
    return rendezvous


C10D_OPTIONS = (
    *("is_host", "store_type", "read_timeout", "join_timeout", "last_call_timeout", "close_timeout"),
    *("heartbeat_timeout", "keep_alive_interval", "keep_alive_max_attempt"),
)
STATIC_OPTIONS = ("rank", "timeout")


def _read_conf(text: str, backend: str) -> dict[str, str]:
    """The options, by name. ``timeout``, which torchrun's c10d takes and ignores, is how long to wait for nodes."""
    known = C10D_OPTIONS if backend == "c10d" else STATIC_OPTIONS
    conf: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = item.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise ConfigError(
                f"--rdzv-conf {text!r}: {item!r} is not key=value", "e.g. --rdzv-conf read_timeout=60,is_host=true"
            )
        name = key.strip()
        if name == "timeout" and backend == "c10d":
            name = "join_timeout"
        if name not in known:
            raise UnknownKey(f"--rdzv-conf {text!r}: rendezvous {backend} has no option {name!r}", nearest(name, known))
        conf.setdefault(name, value.strip())
    return conf
