"""The rank of this process, and the address of rank 0, as the launcher that started the process defines them.

Four launchers are known. The first one in this order whose variables are set decides:

1. **torchrun** and ``outlast launch`` (torchelastic): ``RANK`` or ``TORCHELASTIC_RUN_ID`` is set. It comes first,
   because torchrun itself is often started by srun or mpirun, whose variables its workers inherit.
2. **MPI**: ``OMPI_COMM_WORLD_SIZE`` (Open MPI, PRRTE) or ``PMI_SIZE`` (MPICH, Intel MPI) is set. It comes before Slurm
   because mpirun in a batch job starts its daemons with srun, and ranks inherit the daemons' Slurm variables.
   ``srun --mpi=pmi2`` does not count as MPI: its ``PMI_RANK`` and ``PMI_SIZE`` equal Slurm's own.
3. **Slurm**: srun sets ``SLURM_PROCID``. The shell of a batch script has it too; there it counts if the job has one
   task, and is an error if it has more (the script lacks ``srun``).
4. none of them: a single process.

``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` without ``RANK`` are common in batch scripts and select no launcher,
but an explicit ``MASTER_ADDR`` or ``MASTER_PORT`` is used with all launchers. A single process ignores them: it meets
nobody, and the host of a job that once was may not answer.
"""

from __future__ import annotations

import os
import socket
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from outlast.errors import MissingDependency, PlaceError
from outlast.free_port import free_port
from outlast.launch import slurm
from outlast.launch.ports import loopback

GENERATION = "OUTLAST_GENERATION"
"""Set by ``outlast launch``, because torchelastic counts restarts per agent and not those caused by other nodes."""

_OVERRIDE = "unset the variables of the launcher that did not start this process"


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place of one process among the ranks of its job."""

    rank: int
    """0 to ``world_size - 1``."""
    world_size: int
    local_rank: int
    """0 to ``local_world_size - 1`` on this host; selects the device."""
    local_world_size: int
    master_addr: str
    """Host or address of rank 0."""
    master_port: int
    """Port of rank 0's store; under torchrun its agent may have opened it already."""
    generation: int
    """How often the job's ranks were restarted before, including requeues by Slurm. It is the same on all ranks under
    ``outlast launch``; under plain torchrun with several nodes each node counts for itself."""
    source: str
    """The launcher: ``torchrun``, ``mpi``, ``slurm`` or ``single``."""

    def __post_init__(self) -> None:
        for name, index, size in (
            ("rank", self.rank, self.world_size),
            ("local_rank", self.local_rank, self.local_world_size),
        ):
            if not 0 <= index < size:
                raise PlaceError(f"{self.source}: {name} {index} is not below the world size of {size}", _OVERRIDE)
        if not 0 < self.master_port < 65536:
            raise PlaceError(
                f"{self.source}: master port {self.master_port} is not a port", "set MASTER_PORT to 1 to 65535"
            )

    def environ(self) -> dict[str, str]:
        """The variables that ``torch.distributed``'s ``env://`` reads."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


class Environment(Protocol):
    """The environment variables of one launcher."""

    def is_present(self, environ: Mapping[str, str]) -> bool:
        """Whether this launcher started the process."""
        ...

    def find(self, environ: Mapping[str, str]) -> Place:
        """The place of this process.

        Raises:
            PlaceError: a variable is missing, or is not a number.
        """
        ...


class Torchrun:
    """torchrun, ``outlast launch``, or any launcher that sets torch's own variables."""

    KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

    def is_present(self, environ: Mapping[str, str]) -> bool:
        return "RANK" in environ or "TORCHELASTIC_RUN_ID" in environ

    def find(self, environ: Mapping[str, str]) -> Place:
        _require(environ, self.KEYS, "torchrun")
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
    """mpirun or mpiexec, through mpi4py.

    ``find`` initialises MPI and is collective over ``COMM_WORLD``: if a rank dies before it calls ``find``, the others
    wait until mpirun ends them. Rank 0 chooses a free port, a new one in each call, and broadcasts it as raw bytes.
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
        except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no MPI library
            raise MissingDependency(
                f"this process was started by mpirun, but mpi4py, which returns its rank, cannot be imported: {error}",
                "pip install 'outlast[mpi]', and make sure mpirun's MPI library is on the library path",
            ) from error
        world = MPI.COMM_WORLD
        host = world.Split_type(MPI.COMM_TYPE_SHARED)
        local_rank, local_world_size = host.Get_rank(), host.Get_size()
        host.Free()
        name = bytearray(256)  # UTF-8, padded with zeros; from rank 0
        chosen = array("i", [0])
        if world.Get_rank() == 0:
            alone = local_world_size == world.Get_size()
            addr = environ.get("MASTER_ADDR") or (loopback() if alone else _own_address())
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

    The address of rank 0 is ``MASTER_ADDR`` if set, else the name of the step's first node, or the ``NodeAddr`` that
    ``scontrol`` prints if that name does not resolve. The port is ``MASTER_PORT`` if set, else computed from job and
    step id, from 61440 to 65535.
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
                f"this is the batch script of a Slurm job with {_slurm_size(environ)} tasks, not one of the tasks",
                "start the ranks with srun; for a single process here, unset SLURM_PROCID",
            )
        _require(environ, [key for key in self.KEYS if key != "SLURM_NTASKS"], "srun")
        size = _slurm_size(environ)
        if size is None:
            raise PlaceError("srun's environment is incomplete: SLURM_NTASKS is missing", _OVERRIDE)
        node = _number(environ, "SLURM_NODEID")
        port = slurm.master_port(_number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID"))
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
    """No launcher: one process, rank 0 of 1, on loopback."""

    IGNORED = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
    """Variables of other launchers that a single process may find left over."""

    def is_present(self, environ: Mapping[str, str]) -> bool:
        return True

    def find(self, environ: Mapping[str, str]) -> Place:
        return Place(
            rank=0,
            world_size=1,
            local_rank=0,
            local_world_size=1,
            master_addr=loopback(),
            master_port=free_port(),
            generation=_generation(environ),
            source="single",
        )


ENVIRONMENTS: tuple[Environment, ...] = (Torchrun(), Mpi(), Slurm(), Single())


def find_place(environ: Mapping[str, str] | None = None) -> Place:
    """The place of this process, from its launcher's environment; see the docstring of this module.

    Under MPI this is collective over all ranks (see :class:`Mpi`); otherwise it is local.

    Args:
        environ: the environment to read; None takes ``os.environ``.

    Raises:
        PlaceError: variables are missing or contradict one another; the message lists them.
        MissingDependency: mpirun started the process, but mpi4py is not installed.
    """
    environ = os.environ if environ is None else environ
    for environment in ENVIRONMENTS:
        if environment.is_present(environ):
            return environment.find(environ)
    raise AssertionError("Single is always present")


def _require(environ: Mapping[str, str], keys: tuple[str, ...] | list[str], launcher: str) -> None:
    missing = [key for key in keys if not environ.get(key)]
    if missing:
        present = [f"{key}={environ[key]}" for key in keys if environ.get(key)]
        raise PlaceError(
            f"{launcher}'s environment is incomplete: {', '.join(missing)} missing, "
            f"while {', '.join(present) or 'nothing'} is set",
            "start the ranks with torchrun, outlast launch, srun or mpirun, or set all of these variables; "
            f"for a single process, unset {', '.join(key for key in keys if key in environ) or 'TORCHELASTIC_RUN_ID'}",
        )


def _number(environ: Mapping[str, str], key: str) -> int:
    try:
        return int(environ[key])
    except ValueError as error:
        raise PlaceError(f"{key}={environ[key]!r} is not an integer", _OVERRIDE) from error


def requeues(environ: Mapping[str, str]) -> int:
    """How often Slurm has requeued this job; 0 outside Slurm.

    Slurm sets the count only in jobs that were requeued, so that one may be left over from another job: it does not
    count outside jobs. In a job that another, requeued one has submitted it does; the scripts in ``slurm/`` and
    ``outlast launch`` therefore ask Slurm itself.

    Raises:
        PlaceError: ``SLURM_RESTART_COUNT`` is not an integer.
    """
    if not environ.get("SLURM_RESTART_COUNT") or not environ.get("SLURM_JOB_ID"):
        return 0
    return _number(environ, "SLURM_RESTART_COUNT")


def counted_requeues(environ: Mapping[str, str]) -> int:
    """As :func:`requeues`, by Slurm's own count where there is one in the environment. It takes a call to Slurm.

    Raises:
        PlaceError: ``SLURM_RESTART_COUNT`` is not an integer.
    """
    told = requeues(environ)
    true = slurm.true_restarts(environ["SLURM_JOB_ID"]) if told else None
    return told if true is None else true


def _generation(environ: Mapping[str, str]) -> int:
    if environ.get(GENERATION):
        return _number(environ, GENERATION)
    key = "TORCHELASTIC_RESTART_COUNT"
    return requeues(environ) + (_number(environ, key) if environ.get(key) else 0)


def _slurm_size(environ: Mapping[str, str]) -> str | None:
    return environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or environ.get("SLURM_NPROCS")


def _own_address() -> str:
    """The address that this host's name resolves to, if other hosts can use it; else its fully qualified name."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return socket.getfqdn()
    return socket.getfqdn() if address.startswith("127.") else address
