"""Which rank this process is, and where rank 0 listens: asked of whatever started it.

Four kinds of starter are known, asked in this order; the first that is present decides:

1. **torchrun** and ``outlast launch`` (torchelastic): ``RANK`` or ``TORCHELASTIC_RUN_ID`` is set. It comes first since
   torchrun itself is often started by srun or mpirun, whose variables its workers inherit.
2. **MPI**: ``OMPI_COMM_WORLD_SIZE`` (Open MPI, PRRTE) or ``PMI_SIZE`` (MPICH, Intel MPI) is set. It comes before Slurm
   since mpirun inside a batch job starts its daemons with srun, and ranks inherit those daemons' Slurm variables. What
   ``srun --mpi=pmi2`` sets is not taken for MPI: its ``PMI_RANK`` and ``PMI_SIZE`` equal Slurm's own.
3. **Slurm**: ``SLURM_PROCID`` is set, by srun. The shell of a batch script has it too; there it counts only where the
   job has one task, and is an error where it has more (the script forgot ``srun``).
4. none of them: a single process.

``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` without ``RANK`` are common in batch scripts and select nothing, but
an explicit ``MASTER_ADDR`` or ``MASTER_PORT`` is used under all starters.
"""

from __future__ import annotations

import os
import socket
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from outlast.errors import MissingDependency, PlaceError
from outlast.launch import slurm
from outlast.launch.ports import free_port

GENERATION = "OUTLAST_GENERATION"
"""Set by ``outlast launch``: torchelastic's count is each agent's own, without restarts for other nodes' sake."""

_OVERRIDE = "unset the variables of the starter that is not meant"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one process stands among the ranks of its job."""

    rank: int
    """0 to ``world_size - 1``."""
    world_size: int
    local_rank: int
    """Number among the ranks of this host, 0 to ``local_world_size - 1``; chooses the device."""
    local_world_size: int
    master_addr: str
    """Host or address of rank 0."""
    master_port: int
    """Port at which rank 0 opens its store; under torchrun its agent may have opened it already."""
    generation: int
    """How often the job's ranks were restarted before, requeues by Slurm included. Under ``outlast launch`` it is the
    same on all ranks; under plain torchrun on several nodes it is each node's own count."""
    source: str
    """Who told: ``torchrun``, ``mpi``, ``slurm`` or ``single``."""

    def __post_init__(self) -> None:
        for name, index, size in (
            ("rank", self.rank, self.world_size),
            ("local_rank", self.local_rank, self.local_world_size),
        ):
            if not 0 <= index < size:
                raise PlaceError(f"{self.source}: {name} {index} is not below its world of {size}", _OVERRIDE)
        if not 0 < self.master_port < 65536:
            raise PlaceError(
                f"{self.source}: master port {self.master_port} is no port", "set MASTER_PORT to 1 to 65535"
            )

    def environ(self) -> dict[str, str]:
        """As the variables that ``torch.distributed``'s ``env://`` reads."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


class Environment(Protocol):
    """One kind of starter."""

    def is_present(self, environ: Mapping[str, str]) -> bool:
        """Whether this process was started by it."""
        ...

    def find(self, environ: Mapping[str, str]) -> Place:
        """The place it gave this process.

        Raises:
            PlaceError: its variables are not all there, or are no numbers.
        """
        ...


class Torchrun:
    """torchrun, ``outlast launch``, or any starter that sets torch's own variables."""

    KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

    def is_present(self, environ: Mapping[str, str]) -> bool:
        return "RANK" in environ or "TORCHELASTIC_RUN_ID" in environ

    def find(self, environ: Mapping[str, str]) -> Place:
        _demand(environ, self.KEYS, "torchrun")
        return Place(
            rank=_number(environ, "RANK"),
            world_size=_number(environ, "WORLD_SIZE"),
            local_rank=_number(environ, "LOCAL_RANK"),
            local_world_size=_number(environ, "LOCAL_WORLD_SIZE"),
            master_addr=environ["MASTER_ADDR"],
            master_port=_number(environ, "MASTER_PORT"),
            generation=_generation(environ),
            source="torchrun",
        )


class Mpi:
    """mpirun or mpiexec, asked through mpi4py.

    ``find`` initialises MPI and is a collective call over ``COMM_WORLD``: every rank must make it, and if one dies
    before that the others wait until mpirun ends them. Rank 0 chooses a free port and broadcasts it as raw bytes; each
    call chooses anew.
    """

    def is_present(self, environ: Mapping[str, str]) -> bool:
        if "OMPI_COMM_WORLD_SIZE" in environ:
            return True
        if "PMI_SIZE" not in environ:
            return False
        slurm = (environ.get("SLURM_PROCID"), _slurm_size(environ))
        return (environ.get("PMI_RANK"), environ["PMI_SIZE"]) != slurm

    def find(self, environ: Mapping[str, str]) -> Place:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, and no MPI library for it
            raise MissingDependency(
                f"this process was started by mpirun, and mpi4py, which tells its rank, cannot be used: {error}",
                "pip install 'outlast[mpi]', and have the MPI library that mpirun belongs to where it is found",
            ) from error
        world = MPI.COMM_WORLD
        host = world.Split_type(MPI.COMM_TYPE_SHARED)
        local_rank, local_world_size = host.Get_rank(), host.Get_size()
        host.Free()
        name = bytearray(256)  # UTF-8, padded with zeros; from rank 0
        chosen = array("i", [0])
        if world.Get_rank() == 0:
            alone = local_world_size == world.Get_size()
            addr = environ.get("MASTER_ADDR") or ("127.0.0.1" if alone else _own_address())
            name[: len(addr.encode())] = addr.encode()
            chosen[0] = _number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else free_port()
        world.Bcast([name, MPI.BYTE], root=0)
        world.Bcast([chosen, MPI.INT], root=0)
        return Place(
            rank=world.Get_rank(),
            world_size=world.Get_size(),
            local_rank=local_rank,
            local_world_size=local_world_size,
            master_addr=bytes(name).rstrip(b"\0").decode(),
            master_port=chosen[0],
            generation=_generation(environ),
            source="mpi",
        )


class Slurm:
    """srun, one task per rank.

    Rank 0's host is ``MASTER_ADDR`` where set, else the first node of the step; where its name does not resolve, the
    ``NodeAddr`` that ``scontrol`` knows. The port is ``MASTER_PORT``, else derived from job and step id, from 61440 to
    65535.
    """

    KEYS = (
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_LOCALID",
        "SLURM_NODEID",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_JOB_ID",
    )

    def is_present(self, environ: Mapping[str, str]) -> bool:
        if "SLURM_PROCID" not in environ:
            return False
        return "SLURM_STEP_ID" in environ or _slurm_size(environ) not in (None, "1")

    def find(self, environ: Mapping[str, str]) -> Place:
        if "SLURM_STEP_ID" not in environ:
            raise PlaceError(
                f"this is the batch script of a Slurm job of {_slurm_size(environ)} tasks, not one of its tasks",
                "start the ranks with srun; for a single process here, unset SLURM_PROCID",
            )
        _demand(environ, [key for key in self.KEYS if key != "SLURM_NTASKS"], "srun")
        size = _slurm_size(environ)
        if size is None:
            raise PlaceError("srun's environment is incomplete: SLURM_NTASKS is missing", _OVERRIDE)
        node = _number(environ, "SLURM_NODEID")
        port = slurm.port(_number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID"))
        return Place(
            rank=_number(environ, "SLURM_PROCID"),
            world_size=_number({"SLURM_NTASKS": size}, "SLURM_NTASKS"),
            local_rank=_number(environ, "SLURM_LOCALID"),
            local_world_size=slurm.tasks_on_node(environ["SLURM_STEP_TASKS_PER_NODE"], node),
            master_addr=environ.get("MASTER_ADDR") or slurm.first_node_address(environ),
            master_port=_number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else port,
            generation=_generation(environ),
            source="slurm",
        )


class Single:
    """No starter: one process, rank 0 of 1."""

    def is_present(self, environ: Mapping[str, str]) -> bool:
        return True

    def find(self, environ: Mapping[str, str]) -> Place:
        return Place(
            rank=0,
            world_size=1,
            local_rank=0,
            local_world_size=1,
            master_addr=environ.get("MASTER_ADDR") or "127.0.0.1",
            master_port=_number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else free_port(),
            generation=_generation(environ),
            source="single",
        )


ENVIRONMENTS: tuple[Environment, ...] = (Torchrun(), Mpi(), Slurm(), Single())


def find_place(environ: Mapping[str, str] | None = None) -> Place:
    """The place of this process, as its starter tells it (which see, in this module's docstring).

    Under MPI this is a collective call over all ranks; elsewhere it is local.

    Args:
        environ: the environment to read; None takes ``os.environ``.

    Raises:
        PlaceError: the starter's variables are not all there or contradict one another; the message lists them.
        MissingDependency: started by mpirun, and mpi4py is not installed.
    """
    environ = os.environ if environ is None else environ
    for environment in ENVIRONMENTS:
        if environment.is_present(environ):
            return environment.find(environ)
    raise AssertionError("Single is always present")


def _demand(environ: Mapping[str, str], keys: tuple[str, ...] | list[str], starter: str) -> None:
    missing = [key for key in keys if not environ.get(key)]
    if missing:
        there = [f"{key}={environ[key]}" for key in keys if environ.get(key)]
        raise PlaceError(
            f"{starter}'s environment is incomplete: {', '.join(missing)} missing, "
            f"while {', '.join(there) or 'none'} set",
            "start the ranks with torchrun, outlast launch, srun or mpirun, or set all of these; "
            f"for a single process unset {', '.join(key for key in keys if key in environ) or 'TORCHELASTIC_RUN_ID'}",
        )


def _number(environ: Mapping[str, str], key: str) -> int:
    try:
        return int(environ[key])
    except ValueError as error:
        raise PlaceError(f"{key}={environ[key]!r} is no whole number", _OVERRIDE) from error


def requeues(environ: Mapping[str, str]) -> int:
    """How often Slurm has started this job again; 0 outside Slurm.

    Raises:
        PlaceError: ``SLURM_RESTART_COUNT`` is no number.
    """
    return _number(environ, "SLURM_RESTART_COUNT") if environ.get("SLURM_RESTART_COUNT") else 0


def _generation(environ: Mapping[str, str]) -> int:
    if environ.get(GENERATION):
        return _number(environ, GENERATION)
    key = "TORCHELASTIC_RESTART_COUNT"
    return requeues(environ) + (_number(environ, key) if environ.get(key) else 0)


def _slurm_size(environ: Mapping[str, str]) -> str | None:
    return environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or environ.get("SLURM_NPROCS")


def _own_address() -> str:
    """This host's name where it resolves to an address other hosts can use, else its fully qualified name."""
    name = socket.gethostname()
    try:
        found = socket.gethostbyname(name)
    except OSError:
        return socket.getfqdn()
    return socket.getfqdn() if found.startswith("127.") else found
